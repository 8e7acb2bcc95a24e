"""The smallest model: a text is the input, a text is the output."""


def predict(text: str, times: int = 1) -> str:
    """Return the text in capitals, ``times`` times."""
    return " ".join([text.upper()] * times)


if __name__ == "__main__":
    print(predict("hello", times=2))
