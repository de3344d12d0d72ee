"""How a UserError is shown."""

import pytest

from whet.errors import UserError, tell


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("https://me:s3cr@et@host/a: absent", "https://***@host/a: absent"),
        ("see hf://user:tok%20en@hub.co/x and a:b@c", "see hf://***@hub.co/x and a:b@c"),
        ("https://host:80/a@b", "https://host:80/a@b"),
    ],
)
def test_passwords_in_urls_are_not_shown(capsys, message, shown):
    tell(UserError(message))
    assert capsys.readouterr().err == f"whet: error: {shown}\n"
