# Copyright (c) mmscalablevit contributors. All rights reserved.
"""A plain transcription of the published formulas: the tests' oracle and the benchmark's reference.

Written the way the formulas read and released code of this family computes them: tokens of shape
(B, N, C) in linear layers and norms, NCHW copies for convolutions, explicit softmax, windows split
and merged by copies. Reads the state dict of a backbone, shares no code with the package.
"""

import torch
import torch.nn.functional as F


def plain_forward(state, arch, images, stage_norm='chained', final_norm=False):
    """Return the four stages' maps, NCHW, for the weights of ``state`` in eval mode."""
    x, outs = images, []
    for i in range(4):
        x = patch_embedding(state, f'patch_embeds.{i}', x, stride=4 if i == 0 else 2)
        size = x.shape[-2:]
        x = tokens(x)
        x = layer_norm(state, f'patch_embeds.{i}.norm', x)
        for j in range(arch['depths'][i]):
            x = block(state, arch, i, j, x, size)
            if j == 0:
                x = x + tokens(depthwise(state, f'pos_block.{i}.proj.0', maps(x, size), padding=1))
        out = x
        if stage_norm is not None:
            out = layer_norm(state, f'norm_list.{i}', x)
        if stage_norm == 'chained':
            x = out
        if final_norm and i == 3:
            out = layer_norm(state, 'norm', out)
        x = maps(x, size)
        outs.append(maps(out, size))
    return outs


def patch_embedding(state, name, x, stride):
    weight = state[f'{name}.proj.weight']
    return F.conv2d(x, weight, state[f'{name}.proj.bias'], stride, padding=weight.shape[-1] // 2)


def block(state, arch, i, j, x, size):
    name = f'stages.{i}.{j}'
    attention = window_attention if j % 2 == 0 else scalable_attention
    x = x + attention(state, arch, i, f'{name}.attn', layer_norm(state, f'{name}.norm1', x), size)
    hidden = linear(state, f'{name}.mlp.fc1', layer_norm(state, f'{name}.norm2', x))
    return x + linear(state, f'{name}.mlp.fc2', F.gelu(hidden))


def window_attention(state, arch, i, name, x, size):
    """IWSA: softmax(Q K^T / sqrt(d)) V in windows, plus LIM, a depthwise convolution of V."""
    window, heads = arch['window_sizes'][i], arch['num_heads'][i]
    height, width = size
    x = F.pad(x.unflatten(1, size), (0, 0, 0, -width % window, 0, -height % window))
    padded = x.shape[1:3]
    query, key, value = linear(state, f'{name}.qkv', x).chunk(3, dim=-1)
    windows = [split_heads(split_windows(part, window), heads) for part in (query, key, value)]
    attended = softmax_attention(*windows, scale=(x.shape[-1] // heads) ** -0.5)
    attended = merge_windows(attended, padded, window)
    lim = depthwise(state, f'{name}.lim_func', value.permute(0, 3, 1, 2).contiguous(), padding=1)
    out = (attended + lim.permute(0, 2, 3, 1))[:, :height, :width]
    return linear(state, f'{name}.proj', out.reshape(out.shape[0], height * width, -1))


def split_windows(x, window):
    """(B, H, W, C) to (B * windows, window * window, C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, channels)


def merge_windows(x, size, window):
    """The reverse of ``split_windows``."""
    height, width = size
    x = x.view(-1, height // window, width // window, window, window, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, height, width, x.shape[-1])


def scalable_attention(state, arch, i, name, x, size):
    """SSA: queries of every position, keys and values of a map reduced by ``sr_ratio``."""
    heads, ratio, c_ratio = arch['num_heads'][i], arch['sr_ratios'][i], arch['c_ratios'][i]
    query = linear(state, f'{name}.q', x)
    source = x
    if ratio > 1:
        height, width = size
        source = F.pad(maps(x, size), (0, max(ratio - width, 0), 0, max(ratio - height, 0)))
        source = depthwise(state, f'{name}.reduction.0', source, stride=ratio)
        weight, bias = state[f'{name}.reduction.1.weight'], state[f'{name}.reduction.1.bias']
        source = tokens(F.conv2d(source, weight, bias))
        source = F.gelu(layer_norm(state, f'{name}.norm_act.0', source, eps=1e-5))
    if f'{name}.kv.weight' in state:
        key, value = linear(state, f'{name}.kv', source).chunk(2, dim=-1)
    else:
        key, value = linear(state, f'{name}.k', source), linear(state, f'{name}.v', source)
    parts = [split_heads(part, heads) for part in (query, key, value)]
    scale = (x.shape[-1] // heads * c_ratio) ** -0.5
    return linear(state, f'{name}.proj', softmax_attention(*parts, scale))


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def softmax_attention(query, key, value, scale):
    """Attention of (B, heads, N, D), the heads joined in the result."""
    weights = torch.softmax(scale * (query @ key.transpose(-2, -1)), dim=-1)
    out = (weights @ value).transpose(1, 2)
    return out.reshape(*out.shape[:2], -1)


def tokens(x):
    return x.flatten(2).transpose(1, 2).contiguous()


def maps(x, size):
    return x.transpose(1, 2).unflatten(2, size).contiguous()


def linear(state, name, x):
    return F.linear(x, state[f'{name}.weight'], state[f'{name}.bias'])


def depthwise(state, name, x, stride=1, padding=0):
    weight, bias = state[f'{name}.weight'], state[f'{name}.bias']
    return F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1])


def layer_norm(state, name, x, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], state[f'{name}.weight'], state[f'{name}.bias'], eps)
