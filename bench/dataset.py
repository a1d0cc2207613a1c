"""Text of a data set, by Hugging Face's package `datasets`."""

from __future__ import annotations

from ropewalk.errors import MissingPackageError, UsageError

COLUMNS = ("text", "content", "sentence")


def dataset_text(spec: str) -> str:
    """Return all the text of one split of a data set, its rows joined by empty lines.

    Joined in this way is how perplexities of WikiText are usually told.

    Args:
        spec: NAME[:CONFIG[:SPLIT]], as in `wikitext:wikitext-2-raw-v1:test`; NAME is of the Hub, or a folder. Without
            them, the only config and the split test.

    Raises:
        MissingPackageError: `datasets` is not installed.
        UsageError: no such data set, config or split, or no column of text in it.
    """
    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingPackageError(
            f"--dataset: expected the package datasets (pip install 'ropewalk[datasets]'), {error}"
        ) from error
    try:
        rows = load_dataset(name, config or None, split=split or "test")
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise UsageError(f"--dataset: expected NAME[:CONFIG[:SPLIT]] of a data set, found {spec}: {error}") from error
    column = next((column for column in COLUMNS if column in rows.column_names), None)
    if column is None:
        raise UsageError(
            f"--dataset: expected a column {' or '.join(COLUMNS)} in {spec}, found {', '.join(rows.column_names)}"
        )
    text = "\n\n".join(rows[column])
    if not text.strip():
        raise UsageError(f"--dataset: expected some text, found none in {spec}")
    return text
