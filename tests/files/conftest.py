from tests.data.conftest import folder, tokenizer, write  # noqa: F401
