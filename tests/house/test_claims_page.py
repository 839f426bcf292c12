"""The page of claims: its tables are those of the stored results."""

import importlib.util


def test_the_tables_of_claims_are_those_of_their_results(request):
    path = request.config.rootpath / "docs" / "claims_tables.py"
    spec = importlib.util.spec_from_file_location("claims_tables", path)
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = tables.PAGE.read_text()
    assert page.count("<!-- table: ") == page.count("<!-- end -->") >= 2
    assert tables.written(page) == page, "python docs/claims_tables.py writes them"
    assert tables.written(page.replace("| holds |", "| fails |")) == page
