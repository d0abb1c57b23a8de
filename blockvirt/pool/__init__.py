"""The pool room: devices and their labels, backing files, placement, space. The only room that opens backing files."""
