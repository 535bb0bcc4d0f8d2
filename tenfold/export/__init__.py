"""Export compressed checkpoints to formats that run without tenfold; one file per format, see ``tenfold.export.formats``."""
