"""The command line, called from a test."""

from repro.commands.cli import main


def fails(capsys, *argv) -> tuple[int, str]:
    """Return the exit code of a command that fails, and its one line on stderr."""
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as exit_:
        code = exit_.code
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return code, text
