# Copyright (c) mmscalablevit contributors. All rights reserved.
"""A plain transcription of the published formulas: the tests' oracle and the benchmark's reference.

Explicit softmax, windows split and merged by copies, NCHW convolutions, no fused kernel. Reads the
state dict of a backbone, shares no code with the package.
"""

import math

import torch
import torch.nn.functional as F


def plain_forward(state, arch, images, stage_norm='chained', final_norm=False):
    """Return the four stages' maps, NCHW, for the weights of ``state`` in eval mode."""
    x, outs = images, []
    for i in range(4):
        x = patch_embedding(state, f'patch_embeds.{i}', x, stride=4 if i == 0 else 2)
        for j in range(arch['depths'][i]):
            x = block(state, arch, i, j, x)
            if j == 0:
                x = x + depthwise(state, f'pos_block.{i}.proj.0', x, padding=1)
        out = x
        if stage_norm is not None:
            out = layer_norm(state, f'norm_list.{i}', x)
        if stage_norm == 'chained':
            x = out
        if final_norm and i == 3:
            out = layer_norm(state, 'norm', out)
        outs.append(out)
    return outs


def patch_embedding(state, name, x, stride):
    weight = state[f'{name}.proj.weight']
    x = F.conv2d(x, weight, state[f'{name}.proj.bias'], stride, padding=weight.shape[-1] // 2)
    return layer_norm(state, f'{name}.norm', x)


def block(state, arch, i, j, x):
    name = f'stages.{i}.{j}'
    attention = window_attention if j % 2 == 0 else scalable_attention
    x = x + attention(state, arch, i, f'{name}.attn', layer_norm(state, f'{name}.norm1', x))
    hidden = linear(state, f'{name}.mlp.fc1', layer_norm(state, f'{name}.norm2', x))
    return x + linear(state, f'{name}.mlp.fc2', gelu(hidden))


def window_attention(state, arch, i, name, x):
    """IWSA: softmax(Q K^T / sqrt(d)) V in windows, plus LIM, a depthwise convolution of V."""
    size, heads = arch['window_sizes'][i], arch['num_heads'][i]
    height, width = x.shape[-2:]
    x = F.pad(x, (0, -width % size, 0, -height % size))
    query, key, value = linear(state, f'{name}.qkv', x).chunk(3, dim=1)
    attended = torch.zeros_like(value)
    scale = (x.shape[1] // heads) ** -0.5
    for top in range(0, x.shape[2], size):
        for left in range(0, x.shape[3], size):
            window = (..., slice(top, top + size), slice(left, left + size))
            q, k, v = query[window], key[window], value[window]
            attended[window] = softmax_attention(q, k, v, heads, scale)
    out = attended + depthwise(state, f'{name}.lim_func', value, padding=1)
    return linear(state, f'{name}.proj', out[:, :, :height, :width])


def scalable_attention(state, arch, i, name, x):
    """SSA: queries of every position, keys and values of a map reduced by ``sr_ratio``."""
    heads, ratio, c_ratio = arch['num_heads'][i], arch['sr_ratios'][i], arch['c_ratios'][i]
    query = linear(state, f'{name}.q', x)
    source = x
    if ratio > 1:
        height, width = x.shape[-2:]
        source = F.pad(x, (0, max(ratio - width, 0), 0, max(ratio - height, 0)))
        source = depthwise(state, f'{name}.reduction.0', source, stride=ratio)
        weight, bias = state[f'{name}.reduction.1.weight'], state[f'{name}.reduction.1.bias']
        source = F.conv2d(source, weight, bias)
        source = gelu(layer_norm(state, f'{name}.norm_act.0', source, eps=1e-5))
    if f'{name}.kv.weight' in state:
        key, value = linear(state, f'{name}.kv', source).chunk(2, dim=1)
    else:
        key, value = linear(state, f'{name}.k', source), linear(state, f'{name}.v', source)
    scale = (x.shape[1] // heads * c_ratio) ** -0.5
    return linear(state, f'{name}.proj', softmax_attention(query, key, value, heads, scale))


def softmax_attention(query, key, value, heads, scale):
    """Multi-head attention of NCHW maps, the result in the query's height and width."""
    height, width = query.shape[-2:]
    q, k, v = (t.flatten(2).unflatten(1, (heads, -1)) for t in (query, key, value))
    weights = torch.softmax(scale * q.transpose(-2, -1) @ k, dim=-1)
    return (v @ weights.transpose(-2, -1)).flatten(1, 2).unflatten(2, (height, width))


def linear(state, name, x):
    return torch.einsum('bchw,dc->bdhw', x, state[f'{name}.weight']) + state[f'{name}.bias'].view(
        -1, 1, 1
    )


def depthwise(state, name, x, stride=1, padding=0):
    weight, bias = state[f'{name}.weight'], state[f'{name}.bias']
    return F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1])


def layer_norm(state, name, x, eps=1e-6):
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    weight, bias = (state[f'{name}.{part}'].view(-1, 1, 1) for part in ('weight', 'bias'))
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
