"""Names that other trainers give to keys of the configuration, to answer whoever types them.

The names are those of TrainingArguments (transformers), SFTConfig and the command of TRL, axolotl,
LLaMA-Factory, and common ones. A remark follows where the unit differs.

Example::

    find_other_name("num_train_epochs")     # ("msft.compute_budget", "epochs of one roll-out")
"""

from __future__ import annotations

from collections.abc import Mapping

_COMPUTE_BUDGET = "the epochs of one roll-out, 1 being the active mixture once"
_BATCH_SIZE = "examples per optimizer step, over all processes"
_EVAL_EVERY = "in epochs of the active mixture, or in the unit of evaluation.cadence"
_MODEL_DTYPE = "the dtype of the weights; train.compute_dtype is that of the computation"

OTHER_NAMES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "output_dir": ("", ("output_directory", "out_dir", "save_dir")),
    "resume_every": (
        "in optimizer steps; rollback points are saved with every evaluation",
        ("save_steps", "save_strategy", "saves_per_epoch", "checkpointing_steps", "save_every"),
    ),
    "max_disk": (
        "the limit of all rollback points; those that no rule needs are evicted anyway",
        ("save_total_limit",),
    ),
    "log_every": ("in optimizer steps", ("logging_steps", "logging_strategy", "log_steps")),
    "log_with": (
        "as in [wandb]",
        ("report_to", "use_wandb", "wandb", "use_tensorboard", "use_mlflow", "use_swanlab"),
    ),
    "log_project": ("", ("wandb_project", "project", "project_name", "swanlab_project")),
    "model.path": (
        "",
        (
            "model_name_or_path",
            "model_name",
            "base_model",
            "model_id",
            "model_path",
            "name_or_path",
            "pretrained_model_name_or_path",
        ),
    ),
    "model.dtype": (_MODEL_DTYPE, ("torch_dtype", "bf16", "fp16", "fp32", "float16", "bfloat16")),
    "model.revision": ("", ("model_revision",)),
    "model.quantization": (
        "nf4 or int8, with lora",
        ("load_in_4bit", "load_in_8bit", "quantization_bit", "quantization_config", "quantize"),
    ),
    "model.gradient_checkpointing": (
        "",
        ("activation_checkpointing", "use_gradient_checkpointing"),
    ),
    "model.attn_implementation": (
        "as in flash_attention_2",
        ("flash_attention", "flash_attn", "use_flash_attention_2", "attention", "sdp_attention"),
    ),
    "lora": (
        "a mapping with r, alpha and so on",
        ("adapter", "peft", "peft_config", "use_peft", "use_lora", "finetuning_type"),
    ),
    "lora.r": ("", ("lora_r", "lora_rank", "rank")),
    "lora.alpha": ("", ("lora_alpha",)),
    "lora.dropout": ("", ("lora_dropout",)),
    "lora.target_modules": (
        "all linear layers by default",
        ("lora_target_modules", "lora_target", "lora_target_linear"),
    ),
    "lora.modules_to_save": ("", ("lora_modules_to_save", "additional_target")),
    "lora.rslora": ("", ("use_rslora", "lora_use_rslora", "peft_use_rslora")),
    "data.sub_datasets": (
        "a name for each, with its files",
        (
            "dataset",
            "datasets",
            "dataset_name",
            "dataset_path",
            "train_dataset",
            "train_file",
            "data_files",
            "data_path",
            "eval_dataset",
            "validation_file",
            "test_datasets",
        ),
    ),
    "data.directory": ("a folder of NAME.train.jsonl", ("dataset_dir", "data_dir")),
    "data.max_length": (
        "in tokens",
        (
            "max_seq_length",
            "max_seq_len",
            "sequence_len",
            "sequence_length",
            "seq_length",
            "cutoff_len",
            "block_size",
            "model_max_length",
        ),
    ),
    "train.stochastic_rounding": ("", ("bf16_stochastic_round", "stochastic_round")),
    "train.loss_average": (
        "over tokens, examples or micro_batches",
        ("average_tokens_across_devices", "loss_reduction", "num_items_in_batch"),
    ),
    "data.over_length": ("", ("excess_length_strategy", "truncation", "truncation_mode")),
    "data.loss_on": (
        "the prompt is never trained on",
        (
            "train_on_inputs",
            "train_on_prompt",
            "train_on_completions_only",
            "train_on_last_turn_only",
            "mask_history",
            "completion_only_loss",
            "assistant_only_loss",
            "roles_to_train",
        ),
    ),
    "data.max_examples": (
        "training examples of each sub-dataset",
        ("max_samples", "max_train_samples"),
    ),
    "data.validation_share": (
        "a share of the training examples",
        ("val_set_size", "val_size", "validation_split", "test_size", "eval_split"),
    ),
    "data.seed": ("", ("data_seed", "dataset_seed")),
    "data.sampling": (
        "",
        ("mix_strategy", "interleave_probs", "sampling_strategy", "dataset_weights", "weights"),
    ),
    "train": ("", ("training", "trainer", "training_arguments", "training_args", "sft")),
    "train.lr": ("", ("learning_rate", "learning_rates", "peak_lr", "max_lr")),
    "train.optimizer": ("", ("optim", "optimizer_type", "optimizer_name")),
    "train.betas": ("as in [0.9, 0.999]", ("adam_beta1", "adam_beta2", "beta1", "beta2")),
    "train.eps": ("", ("adam_epsilon", "epsilon", "adam_eps")),
    "train.schedule": (
        "",
        ("lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule", "scheduler_type"),
    ),
    "train.warmup_ratio": ("a share of a stage's steps", ("warmup_steps", "warmup", "num_warmup")),
    "train.batch_size": (
        _BATCH_SIZE,
        (
            "gradient_accumulation_steps",
            "gradient_accumulation",
            "accumulation_steps",
            "train_batch_size",
            "global_batch_size",
            "effective_batch_size",
        ),
    ),
    "train.micro_batch_size": (
        "examples per forward pass and process",
        ("per_device_train_batch_size", "per_device_batch_size"),
    ),
    "train.max_grad_norm": (
        "",
        ("gradient_clipping", "grad_clip", "clip_grad_norm", "gradient_clip_val"),
    ),
    "evaluation.metric": (
        "",
        ("metric_for_best_model", "compute_metrics", "eval_metric", "metrics", "compute_accuracy"),
    ),
    "evaluation.eval_every": (
        _EVAL_EVERY,
        (
            "eval_steps",
            "eval_strategy",
            "evaluation_strategy",
            "evals_per_epoch",
            "eval_interval",
            "val_check_interval",
        ),
    ),
    "evaluation.batch_size": ("", ("per_device_eval_batch_size", "eval_batch_size")),
    "evaluation.max_examples": ("", ("max_eval_samples", "eval_max_samples")),
    "evaluation.max_new_tokens": (
        "",
        ("max_tokens", "generation_max_length", "eval_max_new_tokens", "max_gen_tokens"),
    ),
    "msft.compute_budget": (
        _COMPUTE_BUDGET,
        (
            "epochs",
            "epoch",
            "num_epochs",
            "num_train_epochs",
            "n_epochs",
            "max_epochs",
            "max_steps",
            "num_steps",
            "train_steps",
            "budget",
        ),
    ),
    "msft.peak_window": (
        "in evaluations, for each sub-dataset",
        ("early_stopping_patience", "early_stopping", "early_stopping_steps"),
    ),
}

ABSENT: Mapping[str, tuple[str, ...]] = {
    "it needs none: a batch has examples of similar length, which leaves little padding": (
        "packing",
        "sample_packing",
        "eval_packing",
        "neat_packing",
        "group_by_length",
        "padding_free",
        "pad_to_sequence_len",
    ),
    "it is not a key: start the run with `accelerate launch -m trainer run CONFIG`, whose own "
    "configuration has FSDP2 (docs/howto/dcp.md)": (
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "fsdp_version",
        "ddp_find_unused_parameters",
        "num_processes",
    ),
    "it is not a key: use `msft-train resume RUN`": (
        "resume_from_checkpoint",
        "auto_resume_from_checkpoints",
        "overwrite_output_dir",
    ),
    "it needs none: the result is always the checkpoint with the best overall metric, and a metric "
    "has its direction": ("load_best_model_at_end", "greater_is_better"),
    "it needs none: conversations are written with the chat template of the tokenizer": (
        "chat_template",
        "template",
        "conversation_template",
    ),
    "it has none: name the columns in data.sub_datasets.NAME.fields": (
        "dataset_text_field",
        "prompt_template",
        "text_column",
        "field_messages",
        "message_property_mappings",
    ),
    "it is not supported here: MsftRun takes a Trainer that has it (docs/howto/any_trainer.md)": (
        "torch_compile",
        "use_liger_kernel",
        "use_liger",
        "enable_liger_kernel",
        "neftune_noise_alpha",
        "label_smoothing_factor",
        "freeze_trainable_layers",
        "unfrozen_parameters",
    ),
}


def find_other_name(name: str) -> tuple[str, str] | None:
    """Return the dotted key that a name of another trainer stands for, with a remark, or ``None``.

    The remark says how the key differs, and is empty if it does not.
    """
    for key, (remark, others) in OTHER_NAMES.items():
        if name in others:
            return key, remark
    return None


def find_absent(name: str) -> str | None:
    """Return a sentence on a key of other trainers that has no counterpart, or ``None``."""
    return next((text for text, names in ABSENT.items() if name in names), None)
