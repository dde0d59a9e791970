"""The expected failures: a pattern of test ids, and why those tests cannot pass.

Each must fail, and with its own error: a test that passes, or fails otherwise, ends the suite with
an error.
"""

from typing import NamedTuple


class Reason(NamedTuple):
    """Why a test cannot pass, and a pattern of the error that it fails with."""

    sentence: str
    error: str


# What our method cannot do, or refuses, by design.
CANNOT_MERGE = Reason(
    "A gate on outputs depends on the inputs, so it cannot be merged.", "its gate acts on outputs"
)
ONE_GATE = Reason(
    "Adapters with a gate are refused together: a gate weighs its own change against "
    "the base, so that gated changes do not add up.",
    r"have a gate \(norm\)",
)
BIAS = Reason(
    "The adapter's bias is merged into a layer that had none, and the model's class "
    "builds this layer without one when it loads the merged model.",
    "^AssertionError: $",
)
LINEAR_ONLY = Reason(
    "Only linear layers and transformers' Conv1D can be adapted.",
    "target_modules matches a (Embedding|Conv2d)",
)
NOT_DYNAMIC = Reason(
    "A weight with quantised activations gives its input no gradient, so it is refused.",
    "with quantised activations",
)
TOKENS = Reason(
    "Our configuration has no trainable_token_indices: tokens are no linear layers.",
    "unexpected keyword argument 'trainable_token_indices'",
)
PARAMETERS = Reason(
    "Our configuration has no target_parameters: it names layers.",
    "unexpected keyword argument 'target_parameters'",
)
NO_BIAS = Reason(
    "Our configuration has no setting 'bias': the base's biases stay frozen.",
    "unexpected keyword argument 'bias'",
)

# What the tests take for granted of methods like LoRA.
OTHER_INDICES = Reason(
    "It expects the same adapter from the same seed over the quantised weight, "
    "whose smallest rows and columns are others; a file brings the indices "
    "along.",
    "correlation .* check failed",
)
EVERY_TENSOR = Reason(
    "It writes arbitrary numbers into every tensor of the file, in which ours "
    "has indices and a checksum: they are refused.",
    "cols=.* is not allowed|not implemented for 'Long'",
)
BUFFERS = Reason(
    "PEFT puts parameters on the meta device and leaves buffers, which our indices "
    "are, where they are.",
    "{'cpu', 'meta'} == {'meta'}",
)
MIXED_MODEL = Reason(
    "PeftMixedModel accepts a fixed list of PEFT's own methods.",
    "not compatible with the `PeftMixedModel`",
)
COUNTS = Reason("It expects the number of LoRA's parameters.", r"assert \d+ == ")
LORAS_OWN = Reason(
    "It puts LoRA's own parameters of an embedding into a layer.", "no attribute 'lora_embedding_A'"
)
NO_ADAPTER = Reason(
    "It loads a LoRA adapter from the hub.", "LocalEntryNotFoundError|couldn't connect to"
)
NO_DIFFUSERS = Reason("It needs diffusers and its models.", "no attribute 'from_pretrained'")
SHARDS = Reason("PEFT looks for parts of sharded tensors among LoRA's alone.", "DID NOT WARN")
NO_TAGS = Reason(
    "It expects that a model card has tags: PEFT gives one to LoRA alone.",
    "assert None is not None",
)

MERGES = (
    r"(merge_layers|merge_layers_fp16|safe_merge|disable_adapters_with_merging"
    r"|merge_layers_is_(idempotent|deterministic_in_train_mode)|delete_merged_adapter\w+"
    r"|mixed_adapter_batches_merged_raises)"
)
SEVERAL = (
    r"(multiple_active_adapters_(forward|merge_and_unmerge)|merge_layers_multi"
    r"|sequential_merge_matches_batch_merge|unmerge_after_sequential_merge_restores_base)"
)

EXPECTED = {
    rf"test_custom_models\.py::.*::test_{MERGES}\[gate on outputs": CANNOT_MERGE,
    r"coder_models\.py::.*::test_merge_layers(_nan)?\[gate on outputs": CANNOT_MERGE,
    r"test_feature_extraction_models\.py::.*::test_merge_layers\[gate on outputs": CANNOT_MERGE,
    r"::test_merge_unmerge_unload\[gate on outputs-(?!.*dynamic)": CANNOT_MERGE,
    r"::test_unmerge_after_sequential_merge_restores_base\[gate on outputs": CANNOT_MERGE,
    rf"::test_{SEVERAL}\[gate on .* (same|other)": ONE_GATE,
    rf"::test_(?!.*_forward){SEVERAL}\[gate on outputs different": CANNOT_MERGE,
    r"test_decoder_models\.py::.*::test_merge_layers_multi\[gate on": ONE_GATE,
    r"::test_merge_layers\[gate on the weight-.*(T5|GPTJ|Llama|Gemma3|/tiny-random-DebertaModel)": BIAS,
    r"::test_save_pretrained_targeting_lora_to_embedding_layer": LINEAR_ONLY,
    r"::test_load_resized_embedding": LINEAR_ONLY,
    r"::test_requires_grad_lora_(conv2d|emb_conv1d)": LINEAR_ONLY,
    r"test_quantization\.py.*torchao_int8_dynamic_activation": NOT_DYNAMIC,
    r"::test_quantized_output_similar_to_non_quantized\[(plain|gate).*bnb_4bit": OTHER_INDICES,
    r"::test_add_adapter_rejects_duplicate_name_without_mutation\[True": MIXED_MODEL,
    r"::test_mixed_model_raises": MIXED_MODEL,
    r"as_lora\.py::.*trainable_token": TOKENS,
    r"as_lora\.py::.*target_parameters": PARAMETERS,
    r"::test_get_and_set_peft_model_state_dict_bias_in_module_name": NO_BIAS,
    r"::TestModelAndLayerStatus::test_nb_params": COUNTS,
    r"::TestModelAndLayerStatus::test_model_with_injected_layers": COUNTS,
    r"::TestModelAndLayerStatus::test_model_status_with_modules_to_save": COUNTS,
    r"::TestModelAndLayerStatus::test_(model_)?requires_grad_(model_)?irregular": LORAS_OWN,
    r"::TestModelAndLayerStatus::test_transformers_model": NO_ADAPTER,
    r"::test_inject_from_state_dict_(low_cpu_mem_usage_|model_)with_weight_conversion": EVERY_TENSOR,
    r"::test_prefix_removal_is_undone": EVERY_TENSOR,
    r"::test_inject_from_state_dict_low_cpu_mem_usage$": BUFFERS,
    r"::test_inject_from_state_dict_stable_diffusion": NO_DIFFUSERS,
    r"::test_save_pretrained_warns_for_unsharded_state_dict": SHARDS,
    r"::test_custom_models_dont_have_transformers_tag": NO_TAGS,
}
