"""`sp3llm report`."""

from sp3llm.options import ReportConfig

SETTINGS = ReportConfig
SUMMARY = "write report.html and the model card of a compressed model, or push it"
DESCRIPTION = """\
Write report.html and the model card, README.md, of a compressed model anew,
with all that its record holds by now; --push-to-hub uploads the folder."""
EPILOG = None


def run(settings: ReportConfig) -> None:
    """Adds to the record what `add` names, writes page and card, and uploads the folder."""
    from rich.console import Console

    from sp3llm.reporting.card import write_card
    from sp3llm.reporting.hub import check_login, push
    from sp3llm.reporting.measurements import measured
    from sp3llm.reporting.origins import dense_folder
    from sp3llm.reporting.page import write_page
    from sp3llm.reporting.record import add_to_record, read_record
    from sp3llm.reporting.samples import with_samples
    from sp3llm.runtime.folders import unwritable_told
    from sp3llm.runtime.progress import print_line

    folder, push_to_hub = settings.folder, settings.push_to_hub
    console = Console()
    record = read_record(folder)
    if push_to_hub is not None:
        check_login()
    entries = {key: value for path in settings.add for key, value in measured(path, folder).items()}
    if entries:
        record = add_to_record(folder, **entries)
    record, no_samples = with_samples(folder, record, console, settings.device, settings.dense)
    with unwritable_told(folder):
        write_card(folder, record, dense_folder(record, settings.dense))
        written = write_page(folder, record, no_samples)
    if no_samples:
        print_line(console, f"No samples: {no_samples}")
    print_line(console, f"Written: {written}, {folder / 'README.md'}")
    if push_to_hub is not None:
        url = push(folder, push_to_hub, settings.private, console)
        print_line(console, f"Pushed to {url}")
