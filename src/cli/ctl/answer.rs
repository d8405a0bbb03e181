//! What is read of a VM's answers, whatever their form turns out to be.

use busway_iommu::printable;
use serde_json::Value;

/// A text of the answer's, empty where there is none. What a VM is called, others have chosen.
pub(super) fn text(value: &Value, pointer: &str) -> String {
    let text = value.pointer(pointer).and_then(Value::as_str);
    printable(text.unwrap_or_default())
}

pub(super) fn number(value: &Value, pointer: &str) -> u64 {
    value
        .pointer(pointer)
        .and_then(Value::as_u64)
        .unwrap_or_default()
}

pub(super) fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    let list = value.pointer(pointer).and_then(Value::as_array);
    list.map(Vec::as_slice).unwrap_or_default()
}
