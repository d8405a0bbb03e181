//! What clients demand of what an answer says: JSON pointers, and what has to be there.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;

use serde_json::Value;

/// What the pointer leads to, with its parent; `*` leads to each element.
pub(super) fn find<'a>(
    value: &'a Value,
    pointer: &str,
) -> Vec<(Option<&'a Value>, Option<&'a Value>)> {
    if let Some((before, after)) = pointer.split_once("/*") {
        let list = value.pointer(before).and_then(Value::as_array);
        let elements = list.into_iter().flatten();
        return elements.flat_map(|element| find(element, after)).collect();
    }
    let parent = pointer
        .rsplit_once('/')
        .and_then(|(parent, _)| value.pointer(parent));
    vec![(parent, value.pointer(pointer))]
}

/// Whether the client would take it.
pub(super) fn is(
    op: &str,
    text: &str,
    parent: Option<&Value>,
    found: Option<&Value>,
    wanted: &Value,
) -> bool {
    let absent = found.is_none_or(Value::is_null);
    if op.ends_with('?') && absent || op == "type-if-parent" && parent.is_none() {
        return true;
    }
    let Some(found) = found else {
        return op == "none";
    };
    let has = |one: &Value| {
        let parts = wanted.as_object().unwrap();
        parts.iter().all(|(key, part)| one.get(key) == Some(part))
    };
    let text_of = found.as_str().unwrap_or_default();
    match op.trim_end_matches('?') {
        "eq" => found == wanted,
        "in" => wanted.as_array().unwrap().contains(found),
        "gt" => found.as_u64() > wanted.as_u64(),
        "any" => found.as_array().unwrap().iter().any(has),
        "none" => !found.as_array().unwrap().iter().any(has),
        "contains" => text.contains(wanted.as_str().unwrap()),
        "pty" => File::options()
            .read(true)
            .write(true)
            // It would become this process's own, whose end ends the process.
            .custom_flags(libc::O_NOCTTY)
            .open(text_of)
            .is_ok_and(|file| std::io::IsTerminal::is_terminal(&file)),
        "bdf" => is_bdf(text_of),
        "bus-0" => is_bdf(text_of) && text_of.starts_with("0000:00:") && text_of.ends_with(".0"),
        "mac" => {
            text_of.len() == 17
                && text_of
                    .split(':')
                    .all(|part| u8::from_str_radix(part, 16).is_ok())
        }
        "type" | "type-if-parent" => is_type(found, wanted.as_str().unwrap()),
        other => panic!("no demand is called {other}"),
    }
}

fn is_bdf(text: &str) -> bool {
    text.parse::<busway_pci::Bdf>()
        .is_ok_and(|bdf| bdf.to_string() == text)
}

fn is_type(value: &Value, name: &str) -> bool {
    let all = |is: fn(&Value) -> bool| value.as_array().is_some_and(|list| list.iter().all(is));
    let objects = || {
        value
            .as_object()
            .map(|map| map.values().all(Value::is_object))
    };
    match name {
        "json" => true,
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "i64" => value.is_i64(),
        "u8" => value.as_u64().is_some_and(|number| number <= 255),
        "array<string>" => all(Value::is_string),
        "ipv4" => value
            .as_str()
            .is_some_and(|text| text.parse::<std::net::Ipv4Addr>().is_ok()),
        "object<object<integer>>" | "device_tree" => objects() == Some(true),
        other => panic!("no type is called {other}"),
    }
}
