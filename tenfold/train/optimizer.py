"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer that a Trainer can drive."""

from __future__ import annotations

import torch
from torch import nn

NOT_HIDDEN = ("embed", "wte", "wpe", "head")


class MuonAdamW(torch.optim.Optimizer):
    """Two optimizers of torch behind one face: their groups, states and steps put together.

    Muon orthogonalises the momentum of a matrix; embeddings, heads, biases, norms and factors with more than two
    axes go to AdamW. Muon's step is scaled to AdamW's root mean square, so that one learning rate serves both.

    Reference: Jordan et al. 2024; Liu et al., arXiv 2502.16982 (the scale).
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        hidden = [p for name, p in named if p.ndim == 2 and not any(word in name for word in NOT_HIDDEN)]
        chosen = {id(p) for p in hidden}
        rest = [p for _, p in named if id(p) not in chosen]
        self.parts = [
            torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [
                    {"params": [p for p in rest if p.ndim > 1]},
                    {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
                ],
                lr=lr,
                weight_decay=weight_decay,
                betas=betas,
            ),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._join()

    def _join(self) -> None:
        """Schedulers write learning rates into ``param_groups``: the parts must hold the same dictionaries."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict):
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._join()
