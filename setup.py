# Copyright (c) mmscalablevit contributors. All rights reserved.
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
MIM_PARTS = ('configs', 'demo', 'tools', 'model-index.yml')
NOT_SHIPPED = shutil.ignore_patterns('__pycache__', '*.py[cod]', 'work_dirs')

# mmengine and mmcv are missing here on purpose: two families of distributions ship these import
# names, and pip would overwrite one by the other. The package checks them when it is imported.
MAINTAINED = ['onedl-mmengine>=0.10.12,<0.11', 'onedl-mmcv>=2.3.6,<2.4']
DET = [*MAINTAINED, 'onedl-mmdetection>=3.5.1,<3.6']
SEG = [*MAINTAINED, 'onedl-mmsegmentation>=1.4.2,<1.5', 'ftfy', 'regex']
CLS = [*MAINTAINED, 'onedl-mmpretrain>=1.3.6,<1.4']
OPENMMLAB = [
    'mmengine>=0.10.7,<0.11',
    'mmcv>=2.0.0,<2.2',
    'mmdet>=3.3.0,<3.4',
    'mmsegmentation>=1.2.2,<1.3',
    'mmpretrain>=1.2.0,<1.3',
    'ftfy',
    'regex',
]
# A program of torch.export becomes ONNX by onnxscript; onnxruntime checks it.
ONNX = ['onnx>=1.17', 'onnxscript>=0.5', 'onnxruntime>=1.20']
TEST = [
    'pytest>=8',
    'pytest-timeout>=2',
    'pytest-xdist>=3',
    'hypothesis>=6',
    'psutil',
    'safetensors',
    'ruff==0.17.*',
]
WEIGHTS = ['gdown>=6.5']
TENSORBOARD = ['tensorboard']
NOTEBOOK = ['nbclient', 'nbformat', 'ipykernel', 'matplotlib']
DOCS = ['mkdocs>=1.6,<2', 'mkdocs-material>=9.5', 'mkdocstrings[python]>=1']


class BuildWithMim(build_py):
    """Copy what MIM looks for in an installed package (``mmscalablevit/.mim``) into a wheel."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / 'mmscalablevit' / '.mim'
        shutil.rmtree(target, ignore_errors=True)
        for part in (ROOT / name for name in MIM_PARTS):
            if part.is_dir():
                shutil.copytree(part, target / part.name, ignore=NOT_SHIPPED)
            elif part.is_file():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy2(part, target / part.name)


class EditableWithMim(editable_wheel):
    """Link the same into an editable install, so that MIM sees every later edit."""

    def run(self):
        folder = ROOT / 'mmscalablevit' / '.mim'
        folder.mkdir(exist_ok=True)
        for name in MIM_PARTS:
            link = folder / name
            if (ROOT / name).exists() and not link.exists():
                link.symlink_to(Path('..') / '..' / name)
        super().run()


setup(
    name='mmscalablevit',
    version=(ROOT / 'mmscalablevit' / 'version.py').read_text().split("'")[1],
    description='ScalableViT backbones for mmdet, mmseg and mmpretrain',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords=['computer vision', 'vision transformer', 'object detection', 'semantic segmentation'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
    ],
    python_requires='>=3.10',
    packages=find_packages(include=['mmscalablevit', 'mmscalablevit.*']),
    install_requires=['torch>=2.4', 'numpy', 'filelock'],
    extras_require={
        'det': DET,
        'seg': SEG,
        'cls': CLS,
        'all': sorted({*DET, *SEG, *CLS}),
        'openmmlab': OPENMMLAB,
        'weights': WEIGHTS,
        'tensorboard': TENSORBOARD,
        'notebook': NOTEBOOK,
        'docs': DOCS,
        'onnx': ONNX,
        'test': [*TEST, *WEIGHTS, *TENSORBOARD, *NOTEBOOK, *DOCS, *ONNX],
    },
    cmdclass={'build_py': BuildWithMim, 'editable_wheel': EditableWithMim},
    zip_safe=False,
)
