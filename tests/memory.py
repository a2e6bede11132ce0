"""How much memory a training step of each stage needs, counted without a GPU and without the step.

run     python tests/memory.py
prints  for every stage, in float32 and in bfloat16 (--amp), at several photos at once: GiB

The step is carried out with torch's fake tensors, which have sizes and no content: nothing is
computed, and every storage that lives is counted. So it takes seconds for any batch, and what a GPU
adds is not in it: its context (0.3 to 0.6 GiB), the convolutions' working space and what its
allocator cannot use. The loss's CRF needs real numbers, so it is counted apart, and added.
"""
import sys
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clip
import stage1_cam as stage1
import stage2_weakclip as stage2
import stage3_segment as stage3
from eval import VOC_CLASSES

GIB = 2 ** 30
K = len(VOC_CLASSES)


class Peak(TorchDispatchMode):
    """Within it `live` is how many bytes all tensors have that were made in it, `most` its maximum.

    What is a view of another tensor adds nothing: storages are counted, each once.
    """

    def __init__(self):
        super().__init__()
        self.live = 0
        self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.count, result)
        return result

    def count(self, tensor):
        """Add a tensor's storage, and see that it is taken off when it goes."""
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known.add(storage)
            size = storage.nbytes()
            weakref.finalize(storage, self.change, -size)
            self.change(size)

    def change(self, size):
        """`live` grows by so many bytes."""
        self.live += size
        self.most = max(self.most, self.live)


def classifier(photos):
    """Stage 1 at its defaults -> (model, moments a weight, batch, losses).

    moments: how many numbers the optimizer keeps for each trained weight.
    """
    model = stage1.Classifier("resnet50", "none", K - 1)
    model.pretrained = True  # what ImageNet's weights would fix; the numbers are not needed
    for part in (model.stem, model.layer1, model.layer2):
        part.requires_grad_(False)

    def losses(model, image, target):
        return {"loss": F.multilabel_soft_margin_loss(model(image).float(), target)}
    return model, 0, (torch.zeros(photos, 3, 512, 512), torch.zeros(photos, K - 1)), losses


def weakclip(photos):
    """Stage 2 at its defaults, but for the CRF of the boundary loss -> as `classifier`."""
    model = stage2.WeakCLIP(clip.CLIP(), TOKENS, crop=512)
    mean_std = stage2.mean_and_std(model.switches)

    def losses(model, image, seeds):
        logits, score = model(image)
        return stage2.weakclip_losses(logits, score, image, seeds, model.switches, *mean_std)
    batch = torch.zeros(photos, 3, 512, 512), torch.zeros(photos, 512, 512, dtype=torch.int64)
    return model, 2, batch, losses


def deeplab(photos):
    """Stage 3 at its defaults -> as `classifier`."""
    model = stage3.DeepLab("resnet101", "none", K)
    model.pretrained = True

    def losses(model, image, mask):
        logits = stage2.resize(model(image).float(), mask.shape[1:])
        return {"loss": stage2.mean_cross_entropy(logits, mask)}
    batch = torch.zeros(photos, 3, 448, 448), torch.zeros(photos, 448, 448, dtype=torch.int64)
    return model, 1, batch, losses


def step_peak(stage, photos: int, amp: bool) -> int:
    """Bytes at a step's worst moment: weights, optimizer's state, activations, gradients."""
    with FakeTensorMode(allow_non_fake_inputs=True), Peak() as peak:
        model, moments, batch, losses = stage(photos)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        state = [torch.zeros_like(p) for p in trained for _ in range(moments)]
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            terms = losses(model, *batch)
        sum(terms.values()).backward()
        assert len(state) == moments * len(trained)  # it has lived till here
        return peak.most


def crf_peak(photos: int) -> int:
    """Bytes of the boundary loss's CRF: 64 x 64 cells a photo."""
    p = torch.rand(photos, K, 64, 64).softmax(1)
    image = torch.randint(0, 255, (photos, 3, 64, 64), dtype=torch.uint8)
    with Peak() as peak:
        CRF_TARGET(p, image, 80.0)
        return peak.most


TOKENS = stage2.name_tokens(VOC_CLASSES, 77)
CRF_TARGET = stage2.crf_target


def main():
    """Print the table."""
    # Neither can do without numbers: a tensor of the same size stands for what they return.
    stage2.crf_target = lambda p, image, sxy: p.detach()
    torch.nn.init.trunc_normal_ = lambda tensor, **options: tensor
    crfs = [crf_peak(n) for n in (1, 2, 4, 8, 16)]
    print(f"{'GiB, photos at once':24}", *(f"{n:7}" for n in (1, 2, 4, 8, 16)))
    for stage in (classifier, weakclip, deeplab):
        for amp in (False, True):
            sizes = [step_peak(stage, n, amp) for n in (1, 2, 4, 8, 16)]
            if stage is weakclip:
                sizes = [size + crf for size, crf in zip(sizes, crfs)]
            name = f"{stage.__name__}, {'bfloat16' if amp else 'float32'}"
            print(f"{name:24}", *(f"{size / GIB:7.2f}" for size in sizes), flush=True)


if __name__ == "__main__":
    main()
