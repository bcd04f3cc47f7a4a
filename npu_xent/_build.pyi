# Types of the module that setup.py writes.
VERSION: str
TORCH_VERSION: str
TORCH_NPU_VERSION: str | None
CANN_VERSION: str | None
SOC_VERSIONS: tuple[str, ...]
