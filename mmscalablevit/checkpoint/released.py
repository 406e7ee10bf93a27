# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What a released checkpoint holds, and its keys in our names.

Three layouts are recognized from their names:

- the released classification code: ``stages.i.j``, ``attn.lim_func``, the classifier's ``norm`` and
  ``head``;
- the authors' earlier detection code: ``blocks.i.j``, ``attn.lepe_func`` and ``norm_list``;
- a model of an OpenMMLab toolbox, whose backbone is under ``backbone.``, in either naming.

The weights may be bare or wrapped in ``state_dict``, ``model`` or what averages are kept under.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from ..errors import CheckpointError, one_line, shorten
from .reading import check_values, find_weights, read_checkpoint
from .weights import fetch_released, load_from_address

# In this order: a training state may hold several.
_WRAPPERS = ('state_dict', 'model', 'model_ema', 'state_dict_ema', 'ema_state_dict', 'ema')
_NUM_STAGES = 4
_SCHEME = 'scalablevit://'
# The 4096-wide head of the released models, and the plain one.
_HEADS = (
    {f'head.{layer}.{kind}' for layer in (0, 1, 3) for kind in ('weight', 'bias')},
    {'head.weight', 'head.bias'},
)
_PER_STAGE = ('patch_embeds', 'pos_block', 'stages', 'norm_list')
# Far more than images have; the number in a foreign file can be anything.
_MAX_CHANNELS = 4096


def load_backbone_checkpoint(
    model: nn.Module, checkpoint: str, prefix: str | None = None, map_location: str = 'cpu'
) -> None:
    """Load a checkpoint of any known layout into a backbone, strictly.

    File and backbone must have the same names, but for these differences, logged in one line:

    - left out: what is outside the backbone in the model of a toolbox, the classifier's ``head``,
      its ``norm`` unless the backbone has ``final_norm``, stages after the last output, and norms
      of stages that are no output;
    - ``norm_list`` of a file that has none, as the classifier's: it is initialized to identity.

    Args:
        model (nn.Module): A ``ScalableViT``. It stays as it was if the checkpoint is refused.
        checkpoint (str): A path, a URL, or an address that mmengine's file backends know.
        prefix (str, optional): Beginning of the backbone's names in the file. Defaults to None:
            ``backbone.`` if there are such names, otherwise none.
        map_location (str): Device to read the file to. Defaults to 'cpu'.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file cannot be read or does not fit. The message names the ``arch``
            that fits, or lists the keys.

    Example:
        >>> from mmscalablevit import ScalableViT
        >>> classifier = ScalableViT('small', stage_norm=None, final_norm=True)
        >>> torch.save(dict(model=classifier.state_dict()), 'scalablevit-s.pth')
        >>> load_backbone_checkpoint(ScalableViT('small'), 'scalablevit-s.pth')
    """
    held, outside = split_backbone(read_weights(checkpoint, map_location), checkpoint, prefix)
    parameters = model.state_dict()
    unused = _unused_modules(model)
    surplus = [k for k in held if k not in parameters and module_names([k])[0] in unused]
    state = {name: tensor for name, tensor in held.items() if name not in surplus}

    arch = [name for name, arch in model.arch_zoo.items() if arch == model.arch_settings]
    of_arch = f' of arch {arch[-1]!r}' if arch else ''
    notes = [f'Loaded {checkpoint} into {type(model).__name__}{of_arch}']
    if outside or surplus:
        left_out = ', '.join(module_names([*outside, *surplus]))
        notes.append(f'left out: {one_line(left_out, 1000)}')
    norms = {k: v for k, v in parameters.items() if k.startswith('norm_list.')}
    if norms and not any(name.startswith('norm_list.') for name in held):
        state.update({k: torch.full_like(v, k.endswith('.weight')) for k, v in norms.items()})
        notes.append('norm_list is initialized to identity')

    check_fit(model, state, checkpoint)
    check_values(state, checkpoint, parameters)
    model.load_state_dict(state, strict=True)
    print_log('; '.join(notes), logger='current')


def read_weights(checkpoint: str, map_location: str = 'cpu') -> dict[str, Tensor]:
    """Read the weights of a checkpoint, as :func:`load_backbone_checkpoint` does."""
    address = str(checkpoint)
    if address.startswith(_SCHEME):
        content = read_checkpoint(fetch_released(address), map_location)
    else:
        content = load_from_address(address, map_location)
    weights = find_weights(content, address, _WRAPPERS)
    # Detached from attributes, which a pickle can set and which would hide methods.
    return {name: torch.detach(tensor) for name, tensor in weights.items()}


@CheckpointLoader.register_scheme(prefixes='scalablevit://', force=True)
def load_from_scalablevit(address: str, map_location: str | torch.device | None = None) -> dict:
    """Mmengine's loader of released weights by name: those of an mmpretrain classifier."""
    weights = read_weights(address, map_location or 'cpu')
    state, arch = as_classifier(MODELS.get('ScalableViT'), weights, address)
    print_log(f'{address} holds a classifier of arch {arch!r}', logger='current')
    if arch != address[len(_SCHEME) :].split('?')[0]:
        print_log(f'{address}: {_use_arch(arch)}', logger='current', level=logging.WARNING)
    return dict(meta=dict(arch=arch), state_dict=state)


def split_backbone(
    weights: dict[str, Tensor], checkpoint: str, prefix: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split weights into those of the backbone, in the released names, and the others."""
    if prefix is None:
        prefix = 'backbone.' if any(name.startswith('backbone.') for name in weights) else ''
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    inside = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not inside:
        raise CheckpointError(
            f'checkpoint {checkpoint} holds nothing under the prefix {prefix!r}, only '
            f'{one_line(", ".join(module_names(weights)), 300)}'
        )
    backbone = {released_name(name[len(prefix) :]): tensor for name, tensor in inside.items()}
    outside = {name: tensor for name, tensor in weights.items() if name not in inside}
    if len(backbone) < len(inside):
        raise CheckpointError(f'checkpoint {checkpoint} holds some weights under two names')
    return backbone, outside


def released_name(name: str) -> str:
    """Translate a name of the authors' detection code into that of the released code."""
    return re.sub(r'\.attn\.lepe_func\.', '.attn.lim_func.', re.sub(r'^blocks\.', 'stages.', name))


def detection_name(name: str) -> str:
    """Translate a released name into that of the authors' detection code."""
    return re.sub(r'\.attn\.lim_func\.', '.attn.lepe_func.', re.sub(r'^stages\.', 'blocks.', name))


def nearest_arch(model_type: type[nn.Module], weights: dict[str, Tensor]) -> tuple[str, bool]:
    """Return the named arch most like a checkpoint, and whether all names and shapes agree."""

    def trunk(state: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {k: v.shape for k, v in state.items() if k.split('.')[0] in _PER_STAGE[:3]}

    # Of the names of one arch, the last is the full one.
    names = {id(arch): name for name, arch in model_type.arch_zoo.items()}.values()
    shapes = {name: trunk(_model_like(weights, model_type, name).state_dict()) for name in names}
    wanted = trunk(weights)
    nearest = max(shapes, key=lambda name: len(shapes[name].items() & wanted.items()))
    return nearest, shapes[nearest] == wanted


def recognize(model_type: type[nn.Module], weights: dict[str, Tensor], checkpoint: str) -> str:
    """Check that weights in the released names are those of one whole backbone; name its arch."""
    arch, _ = nearest_arch(model_type, weights)
    check_fit(_model_like(weights, model_type, arch), weights, checkpoint)
    check_values(weights, checkpoint)
    return arch


def as_classifier(
    model_type: type[nn.Module], weights: dict[str, Tensor], checkpoint: str
) -> tuple[dict[str, Tensor], str]:
    """Rename the weights of a released classifier to those of an mmpretrain classifier."""
    inside, outside = split_backbone(weights, checkpoint)
    head = {name: tensor for name, tensor in inside.items() if name.startswith('head.')}
    backbone = {name: tensor for name, tensor in inside.items() if name not in head}
    arch = recognize(model_type, backbone, checkpoint)
    parts = {name.split('.')[0] for name in backbone}
    if outside or head.keys() not in _HEADS or 'norm' not in parts or 'norm_list' in parts:
        raise CheckpointError(
            f'checkpoint {checkpoint} is no released classifier (norm and head, no norm_list, '
            f'nothing else), it holds {", ".join(module_names([*inside, *outside]))}'
        )
    check_values(head, checkpoint)
    state = {
        name.replace('head.', 'head.fc.', 1) if name in head else f'backbone.{name}': tensor
        for name, tensor in inside.items()
    }
    return state, arch


def check_fit(model: nn.Module, state: dict[str, Tensor], checkpoint: str) -> None:
    """Check that weights have exactly the names and shapes of a model's parameters."""
    parameters = model.state_dict()
    lists = {
        'missing': [name for name in parameters if name not in state],
        'unexpected': [name for name in state if name not in parameters],
        'of another shape': [
            f'{name} of {one_line(tuple(tensor.shape))} in place of {tuple(parameters[name].shape)}'
            for name, tensor in state.items()
            if name in parameters and tensor.shape != parameters[name].shape
        ],
    }
    found = [f'{len(names)} {what} ({shorten(names)})' for what, names in lists.items() if names]
    if not found:
        return
    hint = _hint(model, state)
    if not hint and {name.split('.')[0] for name in lists['unexpected']} == {'norm_list'}:
        hint = "it was trained with norms after the stages, use stage_norm='chained' or 'output'"
    raise CheckpointError(
        f'checkpoint {checkpoint} does not fit this {type(model).__name__}: '
        f'{"; ".join(filter(None, [hint, *found]))}'
    )


def module_names(names: Iterable[str]) -> list[str]:
    """Cut parameter names to the modules that a reader wants to know of."""
    parts = [name.split('.') for name in names]
    return list(dict.fromkeys('.'.join(p[: 2 if p[0] in _PER_STAGE else 1]) for p in parts))


def _in_channels(weights: dict[str, Tensor]) -> int:
    shape = getattr(weights.get('patch_embeds.0.proj.weight'), 'shape', ())
    return shape[1] if len(shape) == 4 and 0 < shape[1] <= _MAX_CHANNELS else 3


def _model_like(weights: dict[str, Tensor], model_type: type[nn.Module], arch: str) -> nn.Module:
    """A model without memory, with the stages, norms and input channels of the weights."""
    parts = {name.split('.')[0] for name in weights}
    stages = map(int, re.findall(r'\bpatch_embeds\.([0-3])\.', ' '.join(weights)))
    last = max(stages, default=_NUM_STAGES - 1)
    with torch.device('meta'):
        return model_type(
            arch,
            in_channels=_in_channels(weights),
            out_indices=(last,),
            stage_norm='chained' if 'norm_list' in parts else None,
            final_norm='norm' in parts and last == _NUM_STAGES - 1,
        )


def _unused_modules(model: nn.Module) -> set[str]:
    """What a whole checkpoint has, and a backbone does without."""
    stages = {f'{part}.{i}' for part in _PER_STAGE for i in range(len(model.stages), _NUM_STAGES)}
    norms = enumerate(getattr(model, 'norm_list', ()))
    stages |= {f'norm_list.{i}' for i, norm in norms if isinstance(norm, nn.Identity)}
    return {'head', 'norm', *stages}


def _use_arch(arch: str) -> str:
    return f'it holds arch={arch!r}, use --cfg-options model.backbone.arch={arch}'


def other_arch(model: nn.Module, weights: dict[str, Tensor]) -> str | None:
    """What to set where a model's weights are of another arch than its backbone."""
    if not hasattr(getattr(model, 'backbone', None), 'arch_zoo'):
        return None
    held = {released_name(k[9:]): v for k, v in weights.items() if k.startswith('backbone.')}
    return _hint(model.backbone, held)


def _hint(model: nn.Module, state: dict[str, Tensor]) -> str | None:
    arch, exact = nearest_arch(type(model), state)
    if exact and model.arch_zoo[arch] != model.arch_settings:
        return _use_arch(arch)
    if exact and _in_channels(state) != model.in_channels:
        return f'use in_channels={_in_channels(state)}'
    return None
