"""Errors a user can act on. Each message names the field, file or party at fault and the fix."""


class AppaError(Exception):
    """Base of all errors this project raises on purpose; the CLI prints them without a traceback."""


class ConfigError(AppaError):
    """A configuration that cannot run; raised before any work begins."""


class DataError(AppaError):
    """Input data that cannot be used; names the file and, where there is one, the line."""


class RunError(AppaError):
    """A run directory or checkpoint that cannot be written, read or resumed."""


class PrivacyError(AppaError):
    """A release that its privacy budget, unit or policy does not allow."""
