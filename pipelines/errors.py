"""Errors of loading models and of reading and writing files; those of methods and options are in `tilewise.plugins.errors`."""

from __future__ import annotations

from tilewise.plugins.errors import ConfigError, TilewiseError


class OutputPathError(ConfigError):
    """The output cannot be written where it was asked for; found before anything is generated."""


class OutputError(TilewiseError):
    """Writing or reading a file failed on the way: a full disk, an encoder that stopped, a damaged clip."""


class SetupError(TilewiseError):
    """The machine lacks something that the work needs: a model, the network, a device, a program."""


class ModelError(SetupError):
    """The model is missing, incomplete, damaged or out of reach."""


class DeviceError(SetupError):
    """The device that was asked for is not on this machine."""


class FFmpegError(SetupError):
    """There is no ffmpeg to write or read a clip with."""
