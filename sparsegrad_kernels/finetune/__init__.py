"""The main job: fine-tune a packaged pretrained model on packaged data, by SparseGrad or a peer.

`python -m sparsegrad_kernels.finetune --help`
"""
