"""Rules for Flight Recorder dumps. judge.py applies them in order."""
