"""Losses that are not those of the model."""

from tenfold.train.trainer import DivergenceGuardTrainer


def off_by(monkeypatch, more: dict[int, float]):
    """Losses that are told with ``more`` from some steps on."""

    def told(self, *arguments, **keywords):
        return whole(self, *arguments, **keywords) + more[max(at for at in more if at <= self.state.global_step)]

    whole = DivergenceGuardTrainer.__mro__[1].training_step
    monkeypatch.setattr(DivergenceGuardTrainer.__mro__[1], "training_step", told)
