"""The console program ``megaprot``: one table of commands, each module loaded when its command is called."""

import difflib
import importlib
import sys
from importlib.metadata import version

COMMANDS = {
    "preprocess": ("megaprot.tools.preprocess", "turn sequence files into the indexed data that training reads"),
    "vocabulary": ("megaprot.tools.vocabulary", "train a SentencePiece vocabulary on sequence files"),
    "pretrain": ("megaprot.pretrain.__main__", "pretrain a protein BERT on it, in one process or as one of many"),
    "evaluate": ("megaprot.tools.evaluate", "measure the loss and perplexities of a checkpoint on a corpus"),
    "convert": ("megaprot.tools.convert", "turn checkpoints into Hugging Face folders, and those into checkpoints"),
    "embed": ("megaprot.tools.embed", "turn proteins into vectors with a Hugging Face encoder"),
    "score": ("megaprot.tools.score", "score mutations, or whole proteins, without training"),
    "finetune": ("megaprot.tools.finetune", "fine-tune an encoder on a task: TAPE's five, or labels of your own"),
    "predict": ("megaprot.tools.predict", "predict with a fine-tuned model"),
    "distill": ("megaprot.tools.distill", "train a smaller encoder on a bigger one's logits and hidden states"),
    "plan": ("megaprot.tools.plan", "find the layouts that fit some GPUs, with memory, time and cost"),
    "doctor": ("megaprot.tools.doctor", "check machines, disks and networks before a run"),
    "plot": ("megaprot.tools.plot", "draw the losses of one or more runs"),
    "launch": ("megaprot.launch.__main__", "start a command in several processes, here or on Slurm: launch --help"),
}
"""{command: (module, what it does)}. A module has ``CONFIG`` and ``run``, see run_command_module, or ``main(argv)``."""


def main(argv: list[str] | None = None) -> int:
    """Run ``megaprot COMMAND ARGUMENTS`` and return its exit status: 0, 1 (it failed) or 2 (the input is wrong).

    Only the standard library is loaded before the command is known, so that ``megaprot --help`` answers at once.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print(_help(), end="", file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in ("-h", "--help", "help"):
        print(_help(), end="")
        return 0
    if name in ("-V", "--version"):
        print(f"megaprot {version('megaprot')}")
        return 0
    if name not in COMMANDS:
        best = max(COMMANDS, key=lambda known: difflib.SequenceMatcher(None, name, known).ratio())
        print(f"megaprot: error: unknown command {name!r}; did you mean {best}? (megaprot --help)", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[name][0])
    if not hasattr(module, "CONFIG"):
        return module.main(rest)
    from megaprot.common.command_line import run_command_module

    return run_command_module(f"megaprot {name}", module, rest)


def _help() -> str:
    """Return the list of commands."""
    lines = ["usage: megaprot COMMAND [ARGUMENTS]", "", "Protein language models at Megatron scale.", ""]
    lines += [f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "megaprot COMMAND --help lists a command's keys; megaprot --version prints the version."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
