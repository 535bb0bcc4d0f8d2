"""Schema of the calibration, tokenizer and pre-training sections of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# of the learning rate: those of transformers without further arguments
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Calibrate(StrictModel):
    """Calibration: how activations guide the fits; see ``tenfold.compression.blockwise``.

    Args:
        num_samples: the number of windows, or documents, of the calibration text.
        window: tokens in each; by default the model's context, 1,024 at most.
        input_metric: the metric of the inputs: their ``second`` moment, its ``diagonal`` to the power ``power`` (ASVD), or
            ``none``.
        output_metric: the metric of the outputs: ``full`` Fisher information, the mean of each ``row`` of the weight's (FWSVD),
            or ``none``.
        refit: fit a site on its inputs after all blocks before it are compressed; without it, on the original inputs.
        original_share: with ``refit``, the ratio of the original model's output in the target; the rest is the output of the
            site's own matrix on its present inputs. 1 is the update of SVD-LLM, which shrinks the matrix: least squares damps
            it where its inputs are disturbed.
        bias_correction: let the bias of a site absorb the mean of its error, so that the matrix fits only the rest.
        skip_first: the number of positions at the beginning of every window that do not count.
        fisher_tokens: the number of tokens by which sizes are chosen; the fits read all of the text.
        divergence: the number of tokens on which the change of the predictions is measured, at one size of every item, to scale
            the predicted losses; 0: none. For rules that prune, outside of experts, and for ``criterion: lems``.
        token_weights: ``clipped`` scales the gradient of a token whose norm is not within 0.1 and 10 times the mean to the nearer
            of both, so that no token dominates ``output_metric`` (KFAC-SVD); ``none`` takes gradients as they are.
        damping: what is added to the diagonal of a moment, relative to its mean.
        output_damping: the same for the metric of the outputs; ``damping`` unless given.
        allocate: ``sensitivity`` minimises the total loss, ``uniform`` gives equal shares, ``influence`` larger shares to blocks
            that change their input more (MoDeGPT); of ``tenfold.baselines``: ``svd-llm-v2``, ``lems``, and ``knapsack``, the
            least sum of losses exactly.
        temperature: of ``influence``; the higher, the more equal the shares.
        precision: of the blocks on the calibration text: ``auto`` is bfloat16 where the device has instructions for it, and
            float32 elsewhere. Weights and moments are float32 at least.
    """

    num_samples: int = Field(192, ge=1)
    window: int | None = Field(None, ge=2)
    input_metric: Literal["second", "diagonal", "none"] = "second"
    power: float = 0.5
    output_metric: Literal["full", "row", "none"] = "full"
    refit: bool = True
    original_share: float = Field(0.0, ge=0, le=1)
    bias_correction: bool = True
    skip_first: int = Field(0, ge=0)
    fisher_tokens: int = Field(32768, ge=1)
    divergence: int = Field(0, ge=0)
    token_weights: Literal["none", "clipped"] = "none"
    damping: float = Field(0.01, gt=0)
    output_damping: float | None = Field(None, gt=0)
    allocate: Literal["sensitivity", "uniform", "influence", "svd-llm-v2", "lems", "knapsack"] = "sensitivity"
    temperature: float = Field(0.1, gt=0)
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    seed: int = Field(0, ge=0, lt=2**32)


class Tokenizer(StrictModel):
    """Byte-level BPE of ``vocab_size`` entries, trained on the first ``documents`` of the data, or a tokenizer by ``name``."""

    vocab_size: int | None = Field(None, ge=257)
    documents: int = Field(10_000, ge=1)
    name: str | None = None

    @model_validator(mode="after")
    def _check_source(self):
        if (self.vocab_size is None) == (self.name is None):
            raise ValueError("a tokenizer is either trained (vocab_size) or taken from somewhere (name)")
        return self


class Optimization(StrictModel):
    """What pre-training and distillation have in common.

    Args:
        temperature: of the distributions that divergences compare.
        precision: of matrix products: by default (``auto``) bfloat16 where the device has instructions for it, and float32
            elsewhere; trained weights are in float32.
        compile: torch.compile, of student and teacher without their heads.
        gradient_checkpointing: recompute activations between the blocks in the backward pass.
        save_steps: the number of steps between checkpoints.
    """

    temperature: float = Field(1.0, gt=0)
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    save_steps: int = Field(200, ge=1)


class Train(Optimization):
    """Pre-training on the first ``tokens`` of the data once, ``batch_size * gradient_accumulation_steps`` windows a step.

    Args:
        objective: predict the next token, or (``masked``) the ratio ``mlm_probability`` of tokens that is masked.
        sequence_length: tokens in each; by default all positions of the model.
        eval_tokens: the number of tokens at the end of the data that are not trained on; ``checkpoints`` keeps the one that is
            best on them, beside the last one, which is the result.
        batch_size: windows at once, of all processes together; ``gradient_accumulation_steps`` batches make a step.
        optimizer: ``muon`` for the matrices of the blocks, factors included, and AdamW for the rest; or ``adamw`` for all.
        lr_scaling: ``one`` learning rate, or by the ``fans`` of every factor; see ``tenfold.train.optimizer.optimizer_for``.
        self_guided_fraction: over this part of the steps a dense matrix beside every structured one is annealed away; 0: without.
        compress_at: the part of the steps in which the model is dense; then it is compressed by the recipe's rules, ``budget``
            and ``calibrate`` (on tokens that it was trained on), and training continues. 0: structured from the beginning.
        teacher: the folder or the name of a trained model with the same tokenizer, to distil from.
        losses: the weights of ``cross_entropy`` on the text, and of divergences from the teacher's distributions (``kl``,
            ``reverse_kl``, ``jensen_shannon``), see ``tenfold.train.losses``; by default half and half with ``kl``.
    """

    objective: Literal["causal", "masked"] = "causal"
    mlm_probability: float = Field(0.15, gt=0, lt=1)
    tokens: int | None = Field(None, ge=1)
    sequence_length: int | None = Field(None, ge=2)
    eval_tokens: int = Field(0, ge=0)
    batch_size: int = Field(16, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    optimizer: Literal["muon", "adamw"] = "muon"
    lr_scaling: Literal["one", "fans"] = "one"
    self_guided_fraction: float = Field(0.0, ge=0, le=1)
    compress_at: float = Field(0.0, ge=0, lt=1)
    teacher: str | None = None
    losses: dict[Literal["cross_entropy", "kl", "reverse_kl", "jensen_shannon"], float] | None = Field(
        None, min_length=1
    )
    learning_rate: float = Field(2.0e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    schedule: Schedule = "linear"
    warmup: float = Field(0.03, ge=0)
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _check_conflicts(self):
        clash = "objective masked" if self.objective == "masked" else "compress_at" if self.compress_at else None
        if self.teacher is not None and clash:
            raise ValueError(f"train.teacher goes with everything but {clash}; leave one of them out")
        if self.objective == "causal" and self.mlm_probability != type(self).model_fields["mlm_probability"].default:
            raise ValueError(
                f"train.mlm_probability {self.mlm_probability:g} is of objective masked, and nothing is hidden here; leave it out"
            )
        if self.temperature != 1 and set(self.losses or ()) == {"cross_entropy"}:
            raise ValueError(
                f"train.temperature {self.temperature:g} is of divergences from a teacher, and the losses have none; leave it out"
            )
        return self
