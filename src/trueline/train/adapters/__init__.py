"""A stack of adapters on PEFT: how they are kept, what holds a new one back, how they leave."""
