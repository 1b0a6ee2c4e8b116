"""What one topic notebook needs and is too long for a cell: a file a subject. Nothing else imports from here."""
