"""The table of forms in docs/data.md is the one that the fixtures give."""

from benchmarks import forms


def test_the_table_of_forms_is_up_to_date():
    _, rest = forms.PAGE.read_text().split(forms.MARKS[0])
    shown, _ = rest.split(forms.MARKS[1])
    assert shown.strip() == forms.table(), "call python -m benchmarks.forms"
