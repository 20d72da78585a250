"""Metadata is in pyproject.toml; this file only builds."""

from setuptools import setup

setup()
