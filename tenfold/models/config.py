"""What a recipe says beside its rules: how activations guide the fits, and how a model is pre-trained."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# of the learning rate: those of transformers that need to be told nothing more
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Calibrate(StrictModel):
    """How activations guide the fits; see :mod:`tenfold.compress.blockwise`.

    Args:
        samples: how many windows, or documents, of the calibration text are read.
        window: tokens in each; the model's context, 1,024 at most, unless given.
        inputs: the metric of the inputs: their ``second`` moment, its ``diagonal`` to the power ``power`` (ASVD), or
            ``none``.
        outputs: the metric of the outputs: ``full`` Fisher information, the mean of each ``row`` of the weight's (FWSVD),
            or ``none``.
        refit: whether a site is fitted on the inputs that it gets once all blocks before it are compressed; without it, on
            the original inputs.
        original_share: with ``refit``, the share of the original model's output in the target; the rest is what the site's
            own matrix makes of the inputs that it now gets. All of it (1) is the update of SVD-LLM, and dilutes: where
            inputs are disturbed, least squares shrinks what it makes.
        center: whether the bias of a site takes up the mean of its error, so that only what varies is left to the matrix.
        skip_first: how many positions at the beginning of every window do not count.
        survey: how many tokens of the text the sizes are chosen by; all of it is read for the fits.
        divergence: on how many tokens it is measured, at one size of every item, how far predictions move, which scales what
            is foreseen; 0: not at all. Of rules that narrow, outside of experts.
        token_weights: ``clipped`` scales the gradient of a token whose norm is not within 0.1 and 10 times the mean to the nearer
            of both, so that no token decides ``outputs`` alone (KFAC-SVD); ``none`` takes gradients as they are.
        damping: what is added to the diagonal of a moment, as a share of its mean.
        output_damping: .. of the metric of the outputs; ``damping`` unless given.
        allocate: ``sensitivity`` gives every site the rank that costs the least loss in all, ``uniform`` equal shares,
            ``influence`` larger shares to blocks that change their input more (MoDeGPT); of :mod:`tenfold.baselines`:
            ``svd-llm-v2``, ``lems``, and ``knapsack``, the least sum of losses exactly.
        temperature: of ``influence``; the higher, the more equal the shares.
        refine: steps of gradient descent on the output of every block after its sites are fitted, one batch each.
        refine_rate: its first learning rate, as a share of the root mean square of every tensor.
        precision: in which the blocks run over the calibration text: ``auto`` is bfloat16 where the device has instructions
            for it, and float32 elsewhere. Weights and moments are float32 at least.
    """

    samples: int = Field(192, ge=1)
    window: int | None = Field(None, ge=2)
    inputs: Literal["second", "diagonal", "none"] = "second"
    power: float = 0.5
    outputs: Literal["full", "row", "none"] = "full"
    refit: bool = True
    original_share: float = Field(0.0, ge=0, le=1)
    center: bool = True
    skip_first: int = Field(0, ge=0)
    survey: int = Field(32768, ge=1)
    divergence: int = Field(0, ge=0)
    token_weights: Literal["none", "clipped"] = "none"
    damping: float = Field(0.01, gt=0)
    output_damping: float | None = Field(None, gt=0)
    allocate: Literal["sensitivity", "uniform", "influence", "svd-llm-v2", "lems", "knapsack"] = "sensitivity"
    temperature: float = Field(0.1, gt=0)
    refine: int = Field(0, ge=0)
    refine_rate: float = Field(3e-5, gt=0)
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    seed: int = Field(0, ge=0, lt=2**32)


class Tokenizer(StrictModel):
    """A byte-level BPE of ``vocab_size`` entries, trained on the first ``documents`` of the data, or one by ``name``."""

    vocab_size: int | None = Field(None, ge=257)
    documents: int = Field(10_000, ge=1)
    name: str | None = None

    @model_validator(mode="after")
    def _one_way(self):
        if (self.vocab_size is None) == (self.name is None):
            raise ValueError("a tokenizer is either trained (vocab_size) or taken from somewhere (name)")
        return self


class Train(StrictModel):
    """Pre-training: the first ``tokens`` of the data once, ``batch * accumulate`` windows a step.

    Args:
        objective: the next token, or (``masked``) the share ``hide`` of tokens that is hidden.
        window: tokens in each; all positions that the model has unless given.
        held_out: so many tokens at the end of the data are not trained on; the checkpoint that is best on them is kept.
        batch: windows at once, of all processes together; ``accumulate`` batches make a step.
        optimizer: ``muon`` for the matrices of the blocks, factors included, and AdamW for the rest; or ``adamw`` for all.
        rates: ``one`` learning rate, or by the ``fans`` of every factor; see :func:`tenfold.train.optimizer.optimizer_for`.
        guide: over this part of the steps a dense matrix beside every structured one is annealed away; 0: without.
        fold: for this part of the steps the model is dense, then it is folded by the recipe's rules, ``budget`` and
            ``calibrate`` (by tokens that it was trained on), and trained on; 0: a new one is folded from noise.
        teacher: the folder or the name of a trained model with the same tokenizer, whose predictions are learnt, too.
        losses: the weights of ``cross_entropy``, that of the text, and of divergences from the teacher's distributions (``kl``,
            ``reverse_kl``, ``jensen_shannon``), see :mod:`tenfold.train.losses`; half and half with ``kl`` unless given.
        temperature: of these distributions.
        precision: in which products are computed, by default (``auto``) bfloat16 where the device has instructions for it, and
            float32 elsewhere; the weights that are trained are in float32.
        compile, checkpointing: torch.compile, and activations computed again in the backward pass.
        save_steps: how often a checkpoint is written.
    """

    objective: Literal["causal", "masked"] = "causal"
    hide: float = Field(0.15, gt=0, lt=1)
    tokens: int | None = Field(None, ge=1)
    window: int | None = Field(None, ge=2)
    held_out: int = Field(0, ge=0)
    batch: int = Field(16, ge=1)
    accumulate: int = Field(1, ge=1)
    optimizer: Literal["muon", "adamw"] = "muon"
    rates: Literal["one", "fans"] = "one"
    guide: float = Field(0.0, ge=0, le=1)
    fold: float = Field(0.0, ge=0, lt=1)
    teacher: str | None = None
    losses: dict[Literal["cross_entropy", "kl", "reverse_kl", "jensen_shannon"], float] | None = Field(
        None, min_length=1
    )
    temperature: float = Field(1.0, gt=0)
    learning_rate: float = Field(2.0e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    schedule: Schedule = "linear"
    warmup: float = Field(0.03, ge=0)
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    compile: bool = False
    checkpointing: bool = False
    save_steps: int = Field(200, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _taught(self):
        if self.teacher is not None:
            for what, is_so in (
                ("objective masked", self.objective == "masked"),
                ("fold", self.fold),
            ):
                if is_so:
                    raise ValueError(f"train.teacher goes with everything but {what}; leave one of them out")
        return self

    @model_validator(mode="after")
    def _has_an_effect(self):
        if self.objective == "causal" and self.hide != type(self).model_fields["hide"].default:
            raise ValueError(
                f"train.hide {self.hide:g} is of objective masked, and nothing is hidden here; leave it out"
            )
        if self.temperature != 1 and set(self.losses or ()) == {"cross_entropy"}:
            raise ValueError(
                f"train.temperature {self.temperature:g} is of divergences from a teacher, and the losses have none; leave it out"
            )
        return self
