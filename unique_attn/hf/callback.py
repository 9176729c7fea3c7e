"""The callback by which transformers' Trainer drives the training mask and logs what it does."""

from __future__ import annotations

from typing import Any

from torch import nn

from unique_attn.hf.training import TrainState, train_state  # first: it says what to do where transformers is missing

from transformers import TrainerCallback  # isort: skip


class SparsityCallback(TrainerCallback):
    """Drives temperature and mode of a model from ``unique_attn.enable(model, config, train=TrainConfig(...))``.

    Progress is ``global_step / max_steps``, so a run that resumes from a checkpoint goes on where it was; nothing is
    saved. To the training logs it adds ``sparsity_tau``, ``sparsity_mode`` (0 dense, 1 soft, 2 hard) and the statistics
    ``sparsity_gate_mean``, ``sparsity_gate_open_share``, ``sparsity_mass_kept`` of
    :meth:`unique_attn.hf.TrainState.statistics`: in ``trainer.state.log_history`` and for all callbacks behind this
    one. The Trainer runs reporters (TensorBoard, W&B) before the callbacks of its user; to have them see it too,
    ``trainer.callback_handler.callbacks.insert(0, SparsityCallback())``. Works with TRL's trainers, which are Trainers.
    On several ranks temperature and mode are the same everywhere; statistics are of the rank's own rows.

    Args:
        model: the enabled model, wrapped or not; by default the one that the Trainer trains.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model was not enabled for training; when training begins if ``model`` is None.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self._state: TrainState | None = None if model is None else _state_of(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find the state of the model, which may be wrapped, and set it for the first step."""
        self._state = _state_of(model if self._model is None else self._model)
        self._advance(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set temperature and mode for the next optimizer step, and ask for statistics if they are due."""
        if self._state is None:
            return
        self._advance(state)
        wanted = self._state.train.log_every
        every = int(state.logging_steps if wanted is None else wanted)
        step = state.global_step + 1
        self._state.collect = every > 0 and (step % every == 0 or (step == 1 and bool(args.logging_first_step)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add temperature, mode and statistics to the logs of a training step."""
        if self._state is None or not logs or "loss" not in logs:
            return
        mode = ("dense", "soft", "hard").index(self._state.mode)
        values = {"tau": self._state.tau, "mode": float(mode), **self._state.statistics()}
        named = {f"sparsity_{name}": value for name, value in values.items()}
        logs.update(named)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(named)

    def _advance(self, state: Any) -> None:
        assert self._state is not None
        self._state.update(min(1.0, state.global_step / state.max_steps) if state.max_steps > 0 else 0.0)


def _state_of(model: Any) -> TrainState:
    if not isinstance(model, nn.Module):
        raise TypeError(f"SparsityCallback: expected a model, got {type(model).__name__}")
    state = train_state(model)
    if state is None:
        raise ValueError(
            "SparsityCallback: expected a model from unique_attn.enable(model, config, train=TrainConfig(...)), "
            f"got {type(model).__name__} that is not enabled for training"
        )
    return state
