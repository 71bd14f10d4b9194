"""The LightningModule that trains an adapter and a head (or only a head, or everything)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from nola_vision.adapters.layers import batch_norms
from nola_vision.adapters.methods.base import Method
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.hashing import keyed_hash, sha256_of_tensors
from nola_vision.common.mappings import flattened
from nola_vision.common.text import excerpt
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.models.adapted_model import AdaptedModel, first_not_finite
from nola_vision.models.assembly import adapt
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.training.base import ClassificationTask, Validated
from nola_vision.training.callbacks import is_known, monitoring, update_paths
from nola_vision.training.features import drops_nothing
from nola_vision.training.mean_features import MeanFeatures
from nola_vision.training.schedule import warmup_cosine
from nola_vision.training.trainer_settings import check_monitors

ClassWeights = Literal["none", "balanced"]
_LOOK_EVERY = 50  # steps on a GPU


class Classifier(ClassificationTask):
    """Trains by cross-entropy, with a learning rate that follows `warmup_cosine`. See `make_task`."""

    def __init__(
        self,
        backbone: BackboneSpec,
        method: Method,
        class_names: Sequence[str],
        run_seed: int,
        basis_seed: int | None,
        optimizer: OptimizerCallable,
        label_smoothing: float,
        class_weights: ClassWeights,
        warmup_epochs: int,
        min_lr: float,
        grad_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(len(class_names))
        if not 0 <= label_smoothing <= 1 or warmup_epochs < 0 or min_lr < 0:
            raise NolaVisionError(
                f"label_smoothing ({label_smoothing}) must be from 0 to 1, warmup_epochs ({warmup_epochs}) and min_lr "
                f"({min_lr}) not below 0"
            )
        self.model = adapt(backbone, method, class_names, run_seed, basis_seed).train()
        if grad_checkpointing:
            if not hasattr(self.model.backbone, "set_grad_checkpointing"):
                raise NolaVisionError(
                    f"{backbone.tag} does not support gradient checkpointing: leave grad_checkpointing out"
                )
            self.model.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
        self._compiled = compile
        whole = _Pass(self.model)
        # in a list, so that it is not a second submodule
        self._computed: list[Callable[[Tensor], tuple[Tensor, Tensor]]] = [torch.compile(whole) if compile else whole]
        self.mean_features = MeanFeatures(self.model.bank.num_features)  # for the rounding of the head
        self.strict_loading = False  # a checkpoint lacks the frozen weights; `on_load_checkpoint` checks the others
        self.method, self.optimizer, self.run_seed = self.model.metadata.method, optimizer, run_seed
        self.run_hash: str | None = None  # of the run that trains this, for its checkpoints
        self.began = False  # a step was taken since `fit` was called
        self.train_loss: Tensor | None = None  # of the last epoch
        # the epoch whose weights the model has, and the metric by which a ModelCheckpoint chose it; known after `fit`
        self.epoch: int | None = None
        self.monitor: str | None = None
        self._validated_weights = ""  # digest of the weights that `validated` is of
        self._bad_step: Tensor | None = None  # the first step since the last look whose loss is not finite, else -1
        self.class_weights = class_weights
        self.register_buffer("weights", None, persistent=False)  # `[classes]`, of a training with class weights
        self.label_smoothing, self.warmup_epochs, self.min_lr = label_smoothing, warmup_epochs, min_lr

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images, or of features (`needs_only_features`)."""
        return self._features_and_logits(images)[1]

    def _features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return (images, self.model.classified(images)) if self.on_features else self._computed[0](images)

    def needs_only_features(self) -> bool:
        """Whether every epoch has the same features, and all of them are needed.

        True for a linear probe without augmentation and dropout, on one device. Callbacks of other packages may use the
        images, and with a limited number of batches the features of all images may cost more.
        """
        data, trainer = self.trainer.datamodule, self.trainer  # type: ignore[attr-defined]
        if not self.method.trains_only_head or not isinstance(data, KShotDataModule):
            return False
        count = data.describe()["counts"]["train"]
        limits = trainer.limit_train_batches, trainer.limit_val_batches, trainer.limit_test_batches
        return (
            data.augmentation == "none"
            and trainer.world_size == 1
            and not self._compiled
            and all(isinstance(limit, float) and limit == 1 for limit in limits)  # 1 is one batch, 1.0 all
            and all(map(is_known, trainer.callbacks))  # type: ignore[attr-defined]
            and count * self.model.bank.num_features * 4 <= data.memory_limit_mib * 2**20
            and self._drops_nothing
        )

    @cached_property
    def _drops_nothing(self) -> bool:
        return drops_nothing(self.model)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Starts quantisation-aware training at the step that `quantise_from` sets, that of 1 bit at the first."""
        self.validated = None  # of the weights before this step
        bits_from = self.method.quantise_from
        begun = self.global_step >= bits_from * self.trainer.estimated_stepping_batches
        self.model.compute_with_stored_bits(most=16 if bits_from < 1 and begun else 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        prefix = _prefix(self.run_seed, self.global_step) if self.method.nested else None
        with self.model.bank.using(prefix=prefix):
            features, logits = self._features_and_logits(images)
            loss = self._loss(logits, labels)
        self._update_mean(features, prefix)
        options: dict[str, Any] = {"batch_size": len(labels), "prog_bar": True, "sync_dist": True}
        self.log("train_loss", loss, on_step=False, on_epoch=True, **options)
        return loss

    def _update_mean(self, features: Tensor, prefix: float | None) -> None:
        """Adds a training batch to `mean_features`, if the head is rounded after training and not in it."""
        if self.model.computes_with_rounded_head:
            self.mean_features.clear()
        elif self.model.head_bits < 32 and prefix in (None, 1.0):
            self.mean_features.update(features, int(self.trainer.num_training_batches))

    def _synchronise_mean(self) -> Tensor:
        """Makes `mean_features` that of all processes."""
        for name, tensor in self.mean_features.state().items():
            reduced = self.trainer.strategy.reduce(tensor.to(self.device), reduce_op="mean")
            setattr(self.mean_features, name, reduced)
        return self.mean_features.value

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The weighted cross-entropy, divided by the number of images rather than by the sum of their weights.

        The mean over processes is then that over their images, and balanced weights do not change the loss's scale.
        """
        if self.weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        losses = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
        return (losses * self.weights[labels]).mean()

    def on_train_epoch_start(self) -> None:
        """Seeds dropout by run seed and epoch, so that a resumed run draws the same."""
        torch.manual_seed(keyed_hash("layers", self.run_seed, self.current_epoch) >> 1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Checks the loss; only if it is not finite are the trained tensors searched."""
        self.began = True
        loss = outputs["loss"].detach()
        step = torch.where(loss.isfinite(), -1, self.global_step)
        self._bad_step = step if self._bad_step is None else torch.where(self._bad_step < 0, step, self._bad_step)
        # reading a value synchronises a GPU
        if loss.device.type == "cpu" or self.global_step % _LOOK_EVERY == 0 or self.trainer.is_last_batch:
            bad, self._bad_step = int(self._bad_step), None
            if bad >= 0 and (broken := self.model.not_finite()):
                raise NolaVisionError(f"after step {bad} {broken} is not finite: try a smaller learning rate or scale")

    def on_train_epoch_end(self) -> None:
        self.train_loss, self.epoch = self.trainer.callback_metrics["train_loss"], self.current_epoch
        self._synchronise_mean()  # before the checkpoint, which the first process writes

    def _digest(self) -> str:
        """SHA-256 over the trained tensors: callbacks may change them without a step."""
        state = self.state_dict(keep_vars=True)  # torchao's tensors cannot be detached in inference mode
        return sha256_of_tensors({name: state[name] for name in self._kept(list(state))})

    def _forget_other_validation(self) -> None:
        """Sets `validated` to None if the weights have changed since."""
        if self.validated is not None and self._validated_weights != self._digest():
            self.validated = None

    def on_fit_end(self) -> None:
        """Loads the best epoch's weights, if a ModelCheckpoint kept them, and rounds to the values that are stored."""
        self._forget_other_validation()
        best = monitoring(self.trainer.callbacks)  # type: ignore[attr-defined]
        if best is not None and (path := self.trainer.strategy.broadcast(best.best_model_path)):
            self.epoch, self.monitor = self.load_best(path), best.monitor
        self.model.compute_with_stored_bits(most=0)
        self.model.round_to_stored_bits(self._synchronise_mean())

    def load_best(self, path: str) -> int:
        """Loads the weights that a ModelCheckpoint of this run kept, and returns their epoch.

        Raises:
            NolaVisionError: the file does not exist, is damaged, or fails `refuse_other_checkpoint`.
        """
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            epoch = int(checkpoint["epoch"])
        except FileNotFoundError as error:
            raise NolaVisionError(
                f"the best epoch's checkpoint {path} does not exist: put the file back, or train again without "
                "--ckpt_path"
            ) from error
        except Exception as error:  # a damaged file raises any exception
            raise NolaVisionError(
                f"the best epoch's checkpoint {path} is damaged: train again without --ckpt_path"
            ) from error
        self.load_weights(checkpoint)
        if (stored := checkpoint.get("validated")) is not None:
            self.validated = Validated(**stored)
        return epoch

    def load_weights(self, checkpoint: dict[str, Any]) -> None:
        """Loads the trained values of a checkpoint, after `refuse_other_checkpoint`."""
        self.refuse_other_checkpoint(checkpoint)
        self.validated = None
        self.mean_features.load(checkpoint.get("mean_features"))
        self.load_state_dict(checkpoint["state_dict"], strict=False)

    def on_validation_epoch_start(self) -> None:
        """Evaluates with the values as they are stored in a file; during training the parameters are not rounded.

        After the callbacks' hooks, which may have put other weights in place for the validation.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.model.compute_with_stored_bits(mean_features=self._synchronise_mean())
        else:
            self.model.round_to_stored_bits(self._synchronise_mean())
        self._validated_weights = self._digest()  # callbacks may restore others at the end, before a checkpoint

    def on_test_start(self) -> None:
        self.model.round_to_stored_bits(self._synchronise_mean())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters with their learning rates: the adapter's (or the backbone's), norms and the head's."""
        bank, (lr, head_lr) = self.model.bank, self.method.learning_rates
        inside = self.method.trains_backbone or self.method.edits_backbone
        backbone = [parameter for parameter in self.model.backbone.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": backbone if inside else bank.adapter_parameters(), "lr": lr, "name": "adapter"},
            {"params": [] if inside else backbone, "lr": lr, "name": "norms"},
            {"params": bank.head_parameters(), "lr": head_lr, "name": "head"},
        ]
        return [group for group in groups if group["params"]]

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameter_groups())
        try:
            self.trainer.fit_loop.setup_data()  # with max_steps alone, Lightning has not counted the batches yet
        except ValueError as error:  # batch limits larger than the number of batches
            raise NolaVisionError(f"Lightning cannot train with these settings: {excerpt(error, 80)}") from error
        steps, batches = self.trainer.estimated_stepping_batches, self.trainer.num_training_batches
        if not math.isfinite(steps) or not math.isfinite(batches):
            raise NolaVisionError("the cosine schedule needs an end: give --trainer.max_epochs or --trainer.max_steps")
        steps_per_epoch = math.ceil(batches / self.trainer.accumulate_grad_batches)
        schedule = warmup_cosine(optimizer, int(steps), self.warmup_epochs * steps_per_epoch, self.min_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- checkpoints hold trained values only: the backbone is restored from its tag, the basis from its seed --------

    def _kept(self, names: Sequence[str]) -> set[str]:
        trained = {f"model.backbone.{name}" for name in self.method.trained_in_backbone(self.model.backbone)}
        return {name for name in names if name in trained or not name.startswith("model.backbone.")}

    def _identity(self) -> dict[str, Any]:
        """Settings that must match for a checkpoint to load. Learning rates may differ."""
        metadata = self.model.file_metadata()
        del metadata["weights"], metadata["calibration"]  # the fingerprint covers the weights
        settings = metadata["method"]["init_args"]
        metadata["method"] = {"class": metadata["method"]["class_path"], **settings, "lr": None, "head_lr": None}
        return metadata

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        kept = self._kept(list(state))
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in kept}
        checkpoint["adapter"] = self._identity()
        checkpoint["run_hash"] = self.run_hash
        checkpoint["mean_features"] = self.mean_features.state()
        # for the best epoch's, which is not validated again
        self._forget_other_validation()
        checkpoint["validated"] = None if self.validated is None else dataclasses.asdict(self.validated)
        # for a run that resumes after its last epoch
        loss = self.trainer.callback_metrics.get("train_loss")
        checkpoint["train_loss"] = None if loss is None else float(loss)
        checkpoint["stopped"] = self.trainer.should_stop

    def on_fit_start(self) -> None:
        norms = batch_norms(self.model.backbone).values()
        if self.trainer.world_size > 1 and any(m.training and not isinstance(m, nn.SyncBatchNorm) for m in norms):
            raise NolaVisionError(
                "this method trains batch norms, whose statistics each device would compute from its images: use one "
                "device, or GPUs with --trainer.sync_batchnorm true"
            )
        # `runner.run` does not check it for several processes, which open no images before `fit`
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.class_weights == "balanced":
            self.weights = balanced_weights(data.train_labels, data.num_classes).to(self.device)
        if isinstance(data, KShotDataModule):
            check_monitors(self.trainer, data.describe()["counts"]["validation"] > 0)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.refuse_other_checkpoint(checkpoint)
        self.mean_features.load(checkpoint.get("mean_features"))
        if self.trainer.state.fn == TrainerFn.FITTING:
            loss = checkpoint.get("train_loss")
            self.train_loss, self.epoch = None if loss is None else torch.tensor(loss), checkpoint["epoch"]
            self.trainer.should_stop = bool(checkpoint.get("stopped"))
            states = checkpoint.get("callbacks") or {}
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, ModelCheckpoint) and (state := states.get(callback.state_key)):
                    update_paths(state, str(callback.dirpath))  # before Lightning restores the callback

    def refuse_other_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another backbone, method, seed or set of classes.

        Raises:
            NolaVisionError: as above, or the checkpoint is damaged.
        """
        here, there = flattened(self._identity()), flattened(_mapping(checkpoint.get("adapter")))
        differing = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        if differing:
            key = differing[0]
            raise NolaVisionError(
                f"the checkpoint was written with another {key} ({excerpt(there.get(key), 80)}) than this run's "
                f"({excerpt(here.get(key), 80)}): use the config it was trained with"
            )
        own, stored = self.state_dict(), _mapping(checkpoint.get("state_dict"))
        wrong = self._kept(list(own)) ^ set(stored)
        wrong = wrong or {n for n in stored if own[n].shape != getattr(stored[n], "shape", None)}
        if wrong:
            raise NolaVisionError(
                f"the checkpoint was written by another backbone, method or set of classes: {min(wrong)} does not fit; "
                "use the config it was trained with"
            )
        if broken := first_not_finite(stored):
            raise NolaVisionError(f"the checkpoint is damaged (its {broken} is not finite): give another one")


class _Pass(nn.Module):
    """From images to (features, logits), as a module, with which a compiled pass is copied."""

    def __init__(self, model: AdaptedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.features(images)
        return features, self.model.classified(features)


def balanced_weights(labels: npt.NDArray[np.int64], num_classes: int) -> Tensor:
    """n / (classes * n_c) for each class c `[classes]`; 0 for one without images."""
    counts = np.bincount(labels, minlength=num_classes)
    return torch.tensor(len(labels) / (num_classes * counts.clip(1)) * (counts > 0), dtype=torch.float32)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _prefix(run_seed: int, step: int) -> float:
    """The share of coefficients that a step of nested training uses: all in every other step, else 1/2 to 1/16."""
    draw = keyed_hash("prefix", run_seed, step)
    return 1.0 if draw % 2 else 0.5 ** (1 + draw // 2 % 4)
