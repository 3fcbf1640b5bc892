"""One sample of one step with all its numbers: `minirlhf explain ppo|grpo|reward|dpo [RUN]`."""

import sys

from minirlhf.errors import OK, UserError, run
from minirlhf.run import flags
from minirlhf.tools.explain import grpo, ppo, preference, tiny
from minirlhf.tools.explain.page import Page
from minirlhf.tools.explain.record import Record, read_record
from minirlhf.tools.explain.settings import ExplainConfig


def page_of(record: Record, config: ExplainConfig) -> Page:
    """All that is told of the record's sample."""
    page = Page(config.lang, config.decimals)
    if config.algorithm == "reward":
        preference.explain_reward(record, page)
    elif config.algorithm == "dpo":
        preference.explain_dpo(record, page)
    else:
        explain = {"ppo": ppo.explain, "grpo": grpo.explain}[config.algorithm]
        explain(record, page, config.rows, config.token)
    return page


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(ExplainConfig, argv, "minirlhf explain")
    record = tiny.record(config) if config.run is None else read_record(config)
    if config.sample >= len(record.rows):
        legal = f"there are 0 to {len(record.rows) - 1}"
        raise UserError("--sample", f"got {config.sample}", legal)
    print("\n".join(page_of(record, config).lines))
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
