"""The device side of adb as an ordinary process: ``python -m orchestrator.lab.adbd --port N …``.

Speaks the wire protocol of Android's own daemon, so that a stock adb client cannot tell: connection and
authorisation (``connection``, ``auth``), streams (``stream``), commands (``shell``), files (``sync``). What
it offers is configuration (``features``): it plays a phone too old for exit codes as well as a modern one.
Standard library only, but for the compressions of file transfer, which need their packages.

Source: packages/modules/adb of the Android Open Source Project, protocol.txt and SYNC.TXT.
"""
