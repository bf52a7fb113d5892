"""Fine-tuning a compressed model, or its base, on a task, by transformers' `Trainer`, with the papers' settings."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from ..base.checkpoint import quiet_transformers
from ..errors import CompressionError
from ..foundation.processes import Processes
from .tasks import Settings


def train(
    model: Any,
    tokenizer: Any,
    features: Sequence[dict[str, Any]],
    settings: Settings,
    *,
    seed: int,
    processes: Processes,
    progress: bool = False,
) -> Any:
    """Fine-tune a model on features, and return it in evaluation mode.

    Args:
        model: with a head that computes its loss.
        tokenizer: the model's; it pads.
        features: inputs and labels of each example, as the model takes them.
        settings: see there.
        seed: of the order of examples and of dropout.
        processes: that share the work, each a part of every batch.
        progress: show a progress bar.

    Raises:
        CompressionError: a batch cannot be shared equally by the processes.
    """
    from transformers import DataCollatorWithPadding, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

    class Bar(ProgressCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass  # it would print into our output

    batch_size, device = settings.batch_size, str(processes.device or model.device)
    if batch_size % processes.count:
        raise CompressionError(
            f"A batch of {batch_size} cannot be shared equally by {processes.count} processes; choose another batch size."
        )
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        arguments = TrainingArguments(
            output_dir=folder,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=batch_size // processes.count,
            num_train_epochs=settings.epochs,
            seed=seed,
            use_cpu=device.startswith("cpu"),
            disable_tqdm=not (progress and processes.is_main),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
        )
        if processes.count == 1:
            arguments._n_gpu = min(1, arguments.n_gpu)  # else Trainer splits batches over all GPUs it sees
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=list(features),  # type: ignore[arg-type]
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if progress and processes.is_main:
            trainer.add_callback(Bar())
        trainer.train()
    return model.eval()
