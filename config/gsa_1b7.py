"""
The paper's scale (1.6B parameters) at 4096 tokens, 100B tokens:
    torchrun --nproc_per_node=8 train.py config/gsa_1b7.py
Hardware: one node of 8 × H100.
Duration: not measured yet. Estimated 98 hours, from flops_per_token at an assumed 40 % MFU.
Expected loss: not measured yet.
"""
data = "data/slimpajama"
out_dir = "out/gsa_1b7"
attention = "gsa"
n_layer = 28
n_head = 16
n_kv_head = 8
n_embd = 2048
block_size = 4096
rope_base = 50000.0
k_base = 2048
k_min = 256
k_max = 4096
batch_size = 1
grad_accum = 256  # 1M tokens per step
max_iters = 100000  # 100B tokens
index_warmup_iters = 1000
warmup_iters = 2000
learning_rate = 3e-4
min_lr = 3e-5
eval_interval = 1000
compile = True
