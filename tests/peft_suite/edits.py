"""What is changed in PEFT's test files. Every change must be found where it is expected."""

import ast
import re
from pathlib import Path

# File -> a list of cases, or a test and what it is parametrised by -> what takes its place.
LISTS = {
    "test_custom_models.py": {
        "TEST_CASES": "cases.CUSTOM",
        "ALL_PEFT_CONFIG_CLASSES": "cases.CUSTOM_CLASSES",
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": "cases.SEVERAL_ACTIVE",
        "MIXED_ADAPTER_TEST_CASES": "cases.MIXED",
        ("test_multiple_adapters_mixed_modules_to_save", "config_cls"): "cases.SMALL_CLASSES",
        (
            "test_multiple_adapters_mixed_modules_to_save_order_switched",
            "config_cls",
        ): "cases.SMALL_CLASSES",
        (
            "test_mixed_adapter_batches_different_target_layers",
            "test_name, config0, config1",
        ): "cases.MIXED_OTHER_LAYERS",
        (
            "test_mixed_adapter_batches_multiple_modules_to_save",
            "test_name, config0, config1",
        ): "cases.MIXED_MODULES_TO_SAVE",
        (
            "test_mixed_adapter_batches_unsupported_layer_raises",
            "test_name, config0, config1",
        ): "cases.MIXED_GRU",
        (
            "test_mixed_adapter_batches_partly_overlapping_target_layers",
            "test_name, config0, config1",
        ): "cases.MIXED_OVERLAPPING",
        (
            "test_mixed_adapter_batches_lora_conv1d_emb",
            "test_name, config0, config1",
        ): "cases.MIXED_CONV1D",
        (
            "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save",
            "test_name, config0, config1",
        ): "cases.MIXED_CONV1D_AND_MODULES_TO_SAVE",
        (
            "test_mixed_adapter_batches_lora_wrong_adapter_name_raises",
            "test_name, config",
        ): "[case[:2] for case in cases.MIXED]",
    },
    "test_decoder_models.py": {"ALL_CONFIGS": "cases.models('CAUSAL_LM')"},
    "test_encoder_decoder_models.py": {"ALL_CONFIGS": "cases.models('SEQ_2_SEQ_LM')"},
    "test_feature_extraction_models.py": {"ALL_CONFIGS": "cases.models('FEATURE_EXTRACTION')"},
    "test_seq_classifier.py": {"ALL_CONFIGS": "cases.models('SEQ_CLS')"},
    "test_token_classification_qa.py": {
        "TOKEN_CLS_CONFIGS": "cases.models('TOKEN_CLS')",
        "QA_CONFIGS": "cases.models('QUESTION_ANS')",
    },
    "test_config.py": {"ALL_CONFIG_CLASSES": "cases.CONFIGS"},
    "test_quantization.py": {"TEST_CASES": "cases.QUANTISED"},
    "test_other.py": {
        ("test_self_targeting_is_ignored", "config_cls, config_kwargs"): "cases.TARGETED_TWICE"
    },
}

# Files that are run once more with our method in LoRA's place: the tests to run.
AS_LORA = {
    "test_custom_models.py": r"TestRequiresGrad.*(modules_to_save_|requires_grad_lora|preserves)(?!.*SecuraCase)"
    r"|test_(add_adapter_rejects|delete_adapter_(with_)?multiple|weight_bias|load_resized"
    r"|multiple_adapters_(automatic|no_needless)|(non_)?existing_model_card|load_does_not"
    r"|save_embedding_layers|save_pretrained_targeting_lora|default_target)",
    "test_low_level_api.py": r"TestInject|TestPeftStateDict|TestGetBaseModelStateDict|TestStateDict",
    "test_tuners_utils.py": r"TestModelAndLayerStatus|TestExcluded|TestTargetedModuleNames"
    r"|TestBaseTunerWarn",
    "test_other.py": r"TestModulesToSave|TestTargetingAux",
    "test_hub_features.py": r"TestLocalModel|TestModelCard",
}

# File -> a text -> what takes its place.
NO_DIFFUSERS = {  # Not installed, and not needed: our method adapts no convolution.
    "from diffusers import StableDiffusionPipeline": "StableDiffusionPipeline = type(None)"
}
TEXTS = {
    # Nothing is fetched from the hub.
    "testing_utils.py": {
        'is_offline = override.get("HF_HUB_OFFLINE", False) == "1"': "is_offline = True"
    },
    "testing_common.py": NO_DIFFUSERS
    | {
        # PEFT names the methods that can do something: ours can.
        "if config_cls not in (LoraConfig, RoadConfig):": "if False:",
        "if config_cls not in (LoraConfig,):": "if False:",
        "if config_cls not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig):": "if False:",
        # Our errors say the same in other words.
        "NaNs detected in the merged weights. The adapter default seems to be broken": "the merged weight is not finite: the adapters .'default'. seem to be broken",
    },
    "test_custom_models.py": {
        "Length of `adapter_names` should be the same as the number of inputs, but got ": "adapter_names='5 names' is not allowed: it must be one for each of the 9 samples",
        "Cannot pass `adapter_names` when the model is in training mode.": "adapter_names are for inference",
        "Cannot pass `adapter_names` when there are merged adapters, please call "
        "`unmerge_adapter` first.": "adapter_names cannot be used while adapters are merged",
        "Trying to infer with non-existing adapter(s): does-not-exist, other-does-not-exist": "adapter_names has ['does-not-exist', 'other-does-not-exist']",
        "Trying to infer with non-existing adapter(s): does-not-exist": "adapter_names has ['does-not-exist']",
        # Ours loads a file on the base that it was made for only: each base is the same one.
        "num_hidden_layers=12, size=10):\n        super().__init__()": "num_hidden_layers=12, size=10):\n        super().__init__()\n"
        "        torch.manual_seed(0)",
    },
    "test_decoder_models.py": {
        "if config_cls != LoraConfig:": "if False:",
        # Meant for BEFT alone, this skips every method on models without biases.
        "if isinstance(config_cls, BeftConfig):": "if config_cls is not BeftConfig:",
    },
    "test_low_level_api.py": NO_DIFFUSERS,
    "test_tuners_utils.py": NO_DIFFUSERS
    | {
        "import diffusers\n": "",
        "is_diffusers_ge_v040 = ": "is_diffusers_ge_v040 = True  # ",
        "from parameterized import parameterized": "from peft_suite.cases import parameterized",
    },
}
# The same for the tests that run in LoRA's place: a pattern -> what takes its place.
LORA_TEXTS = {
    # Two tensors of an adapter are LoRA's all; ours has more beside the trained ones.
    r'del (sd_before)\["(\S+)\.lora_A\.weight"\]': r"\1 = {k: v for k, v in \1.items() if '\2' not in k}",
    r' +del sd_before\["\S+\.lora_B\.weight"\]\n': "",
    r"lora_([AB])\.(\w+)\.weight": r"secura_adapter.\2.\1",
    r'lora_([AB])\["(\w+)"\]\.weight': r'secura_adapter["\2"].\1',
    r"(?<=[ ._\"'])lora_(foo|head)": r"secura_\1",
    r"\bfoo_lora\b": "foo_secura",
    r'"lora\.(Linear|Conv2d|Embedding)"': '"secura.SecuraLinear"',
    r'"LoraModel"': '"SecuraModel"',
    r'"LORA"': '"SECURA"',
    r',\s+"lora"(,?\s*\])': r"\1",  # among a model card's tags
    # Layers that our method adapts in the place of others.
    r"(self\.conv[01]) = nn\.Conv2d\(3, 10, 3\)\n(\s+self\.emb[01]) = nn.Embedding\(10, 10\)": r"\1 = nn.Linear(10, 10)\n\2 = nn.Linear(10, 10)",
    r"self\.lin0 = nn\.Linear\(1, 2\)": "self.lin0 = nn.Linear(3, 2)",
    # The base that a file was made for, as above.
    r"(class (?:DummyModel|ModelEmbWithSibling)\(.*\n(?:.*#.*\n)* +def __init__\(self\):\n"
    r" +super\(\).__init__\(\)\n)": r"\1        torch.manual_seed(0)\n",
}


def edited(name: str, source: str) -> str:
    """A test file's source with our cases in it."""
    for old, new in TEXTS.get(name, {}).items():
        if old not in source:
            raise ValueError(f"{name} no longer has {old!r}: mend {__file__}")
        source = source.replace(old, new)
    tree = ast.parse(source)
    places = [(_place(name, tree, what), new) for what, new in LISTS.get(name, {}).items()]
    lines = source.splitlines(keepends=True)
    for node, new in sorted(places, key=lambda place: -place[0].lineno):
        first, last = node.lineno - 1, node.end_lineno - 1
        lines[first : last + 1] = [
            lines[first][: node.col_offset] + new + lines[last][node.end_col_offset :]
        ]
    return _with_lines_after_imports("".join(lines), "from peft_suite import cases, models\n")


def as_lora(name: str, source: str) -> str:
    """A test file's source with our method in LoRA's place."""
    for pattern, new in LORA_TEXTS.items():
        source = re.sub(pattern, new, source)
    return _with_lines_after_imports(edited(name, source), "LoraConfig = cases.AsLora\n")


def _place(name: str, tree: ast.Module, what: str | tuple[str, str]) -> ast.expr:
    """The expression that is to be replaced."""
    if isinstance(what, str):
        found = [
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == what
        ]
    else:
        found = [
            call.args[1]
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name == what[0]
            for call in node.decorator_list
            if isinstance(call, ast.Call) and ast.unparse(call.args[0]) == repr(what[1])
        ]
    if len(found) != 1:
        raise ValueError(f"{name} has {what} {len(found)} times, not once: mend {__file__}")
    return found[0]


def _with_lines_after_imports(source: str, more: str) -> str:
    tree = ast.parse(source)
    end = max(n.end_lineno for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom))
    lines = source.splitlines(keepends=True)
    return "".join([*lines[:end], more, *lines[end:]])


def write(tests: Path, folder: Path) -> None:
    """Writes the test files, with our cases in them, to a package."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").touch()
    sources = {name: (tests / name).read_text() for name in {*LISTS, *TEXTS, *AS_LORA}}
    everything = "".join(sources[name] for name in AS_LORA)
    for pattern in LORA_TEXTS:
        if not re.search(pattern, everything):
            raise ValueError(f"PEFT's tests no longer have {pattern!r}: mend {__file__}")
    for name in {*LISTS, *TEXTS}:
        (folder / name).write_text(edited(name, sources[name]))
    for name in AS_LORA:
        (folder / name.replace(".py", "_as_lora.py")).write_text(as_lora(name, sources[name]))
