"""Recordings with annotated events: their forms, and windows made of them."""
from .load import Annotations, Event, explain_annotated, is_annotated, load_annotations
from .windows import MODES, AnnotationRules, cut_events, manifest_of_events

__all__ = ["MODES", "AnnotationRules", "Annotations", "Event", "cut_events", "explain_annotated",
           "is_annotated", "load_annotations", "manifest_of_events"]
