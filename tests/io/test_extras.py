import sys

import pytest

from diffcore.io.extras import EXTRAS, MissingExtraError, has_extra, import_extra


def test_an_installed_module_is_returned():
    assert import_extra("json.decoder", "A test", extra="train").JSONDecoder


@pytest.mark.parametrize("package", sorted(EXTRAS))
def test_a_missing_package_is_named_with_its_extra_and_the_command(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError) as raised:
        import_extra(f"{package}.something", "A test")
    message = str(raised.value)
    assert message.startswith("A test needs the package")
    assert package in message
    assert f"pip install 'diffcore[{EXTRAS[package]}]'" in message


def test_a_module_that_fails_to_import_something_else_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin.py").write_text("import absent_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent_dependency") as raised:
        import_extra("broken_plugin", "A test", extra="train")
    assert not isinstance(raised.value, MissingExtraError)


def test_has_extra_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "raises_when_imported.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path)
    assert has_extra("raises_when_imported")
    assert not has_extra("absent_dependency")
