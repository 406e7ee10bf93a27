# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Pictures of the backbone: what they are computed from, and that any size gives them."""

import cv2
import numpy as np
import pytest
import torch
from golden import TINY
from jobs import ROOT, load_tool, write_image
from torch import nn

from mmscalablevit import ScalableViT

TOOL = 'tools/analysis_tools/visualize_backbone.py'
CONFIG = ROOT / 'tests' / 'data' / 'tiny_upernet.py'
tool = load_tool(TOOL)
PICTURES = ['attention.png', 'features.png', 'receptive_fields.png', 'windows.png']


@pytest.mark.parametrize('kv', ['separate', 'merged'])
@pytest.mark.parametrize('size', [(53, 70), (9, 30)])
def test_what_is_drawn_is_what_the_attentions_compute(kv, size):
    torch.manual_seed(0)
    backbone = ScalableViT(dict(TINY, ssa_kv=kv)).eval()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    attentions = tool.last_attentions(backbone)
    assert attentions['3.ssa'] is backbone.stages[3][1].attn
    outs, maps = tool.record(backbone, attentions, torch.randn(1, 3, *size))
    assert len(outs) == 4
    for i in range(4):
        attended, lim = tool.window_parts(maps, f'{i}.iwsa')
        attn, (x, out) = attentions[f'{i}.iwsa'], maps[f'{i}.iwsa']
        assert_close(attn.proj(attended + lim)[: out.shape[1], : out.shape[2]], out[0])
        nn.init.zeros_(attn.lim_func.weight)
        nn.init.zeros_(attn.lim_func.bias)
        assert_close(attn.proj(attended)[: out.shape[1], : out.shape[2]], attn(x)[0])

        attn, (x, out) = attentions[f'{i}.ssa'], maps[f'{i}.ssa']
        key, value = attn.key_value(x)
        for row, column in ((0, 0), (x.shape[1] - 1, x.shape[2] - 1)):
            weights = tool.attention_at(maps[f'{i}.ssa.q'][1][0, row, column], key[0], attn)
            assert weights.shape == (attn.num_heads, *key.shape[1:3])
            values = value[0].unflatten(-1, (attn.num_heads, -1))
            here = attn.proj(torch.einsum('hyx,yxhd->hd', weights, values).flatten())
            assert_close(here, out[0, row, column])


def assert_close(value, wanted):
    torch.testing.assert_close(value, wanted, atol=1e-3, rtol=1e-3)


def test_receptive_field_of_a_convolution():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 5, padding=2)

        def forward(self, x):
            return [self.conv(x), 2 * self.conv(x)]

    model = Model()
    nn.init.ones_(model.conv.weight)
    first, second = tool.receptive_fields(model, 2, 11)
    wanted = np.zeros((11, 11))
    wanted[3:8, 3:8] = 3
    np.testing.assert_allclose(first, wanted)
    np.testing.assert_allclose(second, 2 * wanted)
    assert tool.side_holding(first, 0.35) == 3
    assert tool.side_holding(first, 0.9) == 5


def test_receptive_field_of_an_untrained_backbone_is_not_empty():
    torch.manual_seed(0)
    backbone = ScalableViT(tool.cli.Config.fromfile(CONFIG).model.backbone.arch).eval()
    backbone.init_weights()
    fields = tool.receptive_fields(backbone, 1, 96)
    assert [field.shape for field in fields] == [(96, 96)] * 4
    sides = [tool.side_holding(field, 0.5) for field in fields]
    assert 4 < sides[0] < sides[2]


def test_principal_components_find_the_direction_of_change():
    ramp = torch.linspace(-1, 1, 12).expand(4, 12)
    x = torch.randn(8, 1, 1, generator=torch.Generator().manual_seed(0)).abs() * ramp
    colors = tool.principal_components(x + 1e-3 * torch.randn(x.shape))
    assert colors.shape == (4, 12, 3)
    assert np.corrcoef(colors[..., 0].ravel(), ramp.numpy().ravel())[0, 1] > 0.99


@pytest.mark.parametrize('size', [(20, 31), (150, 90)])
def test_pictures_of_any_size(call, tmp_path, size):
    pytest.importorskip('mmseg')
    write_image(tmp_path / 'image.png', size)
    torch.manual_seed(0)
    backbone = ScalableViT(tool.cli.Config.fromfile(CONFIG).model.backbone.arch)
    weights = {f'backbone.{key}': value for key, value in backbone.state_dict().items()}
    torch.save(dict(state_dict=weights), tmp_path / 'weights.pth')
    words = ['--config', CONFIG, '--checkpoint', 'weights.pth', '--point', '2,30']
    words += ['--erf-images', 1, '--erf-size', 64, '--dpi', 40, '--out-dir', 'out']
    code, printed = call(TOOL, 'image.png', *words)
    assert code == 0
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == PICTURES
    for name in PICTURES:
        assert f'wrote out/{name}' in printed
        assert cv2.imread(str(tmp_path / 'out' / name)).std() > 10


@pytest.mark.parametrize(
    ('image', 'words', 'said'),
    [
        ('image.png', ['--point', '40,3'], '--point 40,3 is outside of the image of 40x30'),
        ('image.png', ['--point', 'center'], '--point must be X,Y'),
        ('image.png', ['--arch', 'huge'], "got 'huge'"),
        ('image.png', ['--checkpoint', 'missing.pth'], 'missing.pth'),
        ('none.jpg', [], 'does not exist'),
    ],
)
def test_wrong_arguments(call, tmp_path, image, words, said):
    write_image(tmp_path / 'image.png')
    assert said in call(TOOL, image, '--out-dir', 'out', *words)[0]
