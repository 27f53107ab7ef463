"""
The demo (0.5M parameters) at 512 bytes:
    python prepare.py --dataset demo
    python train.py config/gsa_demo.py
Hardware: one laptop CPU, 2 cores.
Duration: 8 minutes, when nothing else runs.
Expected loss: 1.32 bits/byte on val.bin with seed 1337. The needle at 512 bytes is found with every
seed: 0.97 ± 0.02 of eight (LOG.md).
"""
data = "data/demo"
out_dir = "out"
attention = "gsa"
n_layer = 2
n_head = 4
n_kv_head = 2
n_embd = 128
rope_base = 1e6
qkv_bias = True
look_back = 3.0
identity_init = True
block_size = 512
n_index_head = 4
d_index = 32
k_base = 96
k_min = 32
k_max = 128
batch_size = 4
muon = True
max_iters = 2400
index_warmup_iters = 1000
learning_rate = 1.5e-3
min_lr = 1.5e-5
warmup_iters = 50
short_iters = 800
short_block = 128
weight_decay = 0.05
eval_interval = 1200
eval_iters = 8
log_interval = 50
