"""`DATA_SETS`, the table of data sets by their Hub id. To add one, write a file with its configurations, and its name
here."""

from . import helpsteer2, helpsteer3, ultrafeedback, ultrafeedback_binarized
from .configuration import DataSet


_FILES = (helpsteer2, helpsteer3, ultrafeedback, ultrafeedback_binarized)

DATA_SETS: dict[str, DataSet] = {data.repo: data for file in _FILES for data in file.DATA_SETS}
