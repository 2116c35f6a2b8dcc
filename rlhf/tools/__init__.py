"""Commands that use a finished model: generate replies, chat, merge an adapter into its base model."""
