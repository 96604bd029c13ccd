"""The one error that bad input data raises."""


class DataError(ValueError):
    """Input data cannot be used as they are; the message says what, where and how to mend it."""
