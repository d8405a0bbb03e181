//! The language of a flag's value: `key=value,key=value,…`, as Cloud Hypervisor has it.
//!
//! A value in double quotes may hold commas and brackets, and `""` in it stands for one quote. A value
//! in brackets is a list: `[a,b]`. What the keys are is not known here.

use super::value::Value;

/// One part between two commas.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Item {
    /// What is before the first `=`, where there is a word and a `=`.
    pub(super) key: Option<String>,
    /// What is after it, or all of it.
    pub(super) value: Value,
}

/// Why a text is not a list of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SyntaxError {
    /// a quote (") is not closed
    #[error("a quote (\") is not closed")]
    Quote,
    /// a bracket is not closed, or not opened
    #[error("a bracket ([ or ]) has no other one; put the value in double quotes if it is meant")]
    Bracket,
    /// there is nothing between two commas, or after the last
    #[error("there is nothing between two commas, or beside one at the end")]
    Comma,
}

/// Splits a flag's value into its items. An empty text has none.
pub(super) fn parse(text: &str) -> Result<Vec<Item>, SyntaxError> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    split(text)?
        .into_iter()
        .map(|part| match part.split_once('=') {
            _ if part.is_empty() => Err(SyntaxError::Comma),
            Some((key, value)) if is_key(key) => Ok(Item {
                key: Some(key.to_owned()),
                value: parse_value(value)?,
            }),
            _ => Ok(Item {
                key: None,
                value: parse_value(part)?,
            }),
        })
        .collect()
}

fn parse_value(text: &str) -> Result<Value, SyntaxError> {
    let inside = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'));
    let Some(inside) = inside else {
        return Ok(Value::Text(unquote(text)));
    };
    if inside.is_empty() {
        return Ok(Value::List(Vec::new()));
    }
    let values = split(inside)?
        .into_iter()
        .map(|part| Value::Text(unquote(part)));
    Ok(Value::List(values.collect()))
}

/// The parts between the commas that stand outside of quotes and brackets.
fn split(text: &str) -> Result<Vec<&str>, SyntaxError> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(comma) = first_comma(rest)? {
        let (part, after) = rest.split_at(comma);
        parts.push(part);
        rest = after.strip_prefix(',').unwrap_or(after);
    }
    parts.push(rest);
    Ok(parts)
}

fn first_comma(text: &str) -> Result<Option<usize>, SyntaxError> {
    let mut quoted = false;
    let mut depth = 0_usize;
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            b'"' => quoted = !quoted,
            _ if quoted => (),
            b'[' => depth = depth.saturating_add(1),
            b']' => depth = depth.checked_sub(1).ok_or(SyntaxError::Bracket)?,
            b',' if depth == 0 => return Ok(Some(index)),
            _ => (),
        }
    }
    match (quoted, depth) {
        (true, _) => Err(SyntaxError::Quote),
        (false, 0) => Ok(None),
        (false, _) => Err(SyntaxError::Bracket),
    }
}

/// The text without its quotes; a doubled one inside of quotes is one that was meant.
fn unquote(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut quoted = false;
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character != '"' {
            plain.push(character);
        } else if quoted && characters.next_if_eq(&'"').is_some() {
            plain.push('"');
        } else {
            quoted = !quoted;
        }
    }
    plain
}

/// Keys are words; `/a=b` and `"a"=b` are values that hold a `=`.
fn is_key(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    !text.is_empty() && text.bytes().all(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn item(key: &str, value: &str) -> Item {
        Item {
            key: Some(key.to_owned()),
            value: Value::Text(value.to_owned()),
        }
    }

    /// The text that says these items.
    fn format(items: &[Item]) -> String {
        let quote = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
        let parts = items.iter().map(|item| {
            let key = item.key.as_ref().map(|key| format!("{key}="));
            let value = match &item.value {
                Value::List(values) => {
                    let values: Vec<_> = values.iter().map(|v| quote(&v.to_string())).collect();
                    format!("[{}]", values.join(","))
                }
                value => quote(&value.to_string()),
            };
            key.unwrap_or_default() + &value
        });
        parts.collect::<Vec<_>>().join(",")
    }

    #[test]
    fn keys_and_values_come_in_order() {
        assert_eq!(
            parse("path=/a b.raw,readonly=on,id="),
            Ok(vec![
                item("path", "/a b.raw"),
                item("readonly", "on"),
                item("id", "")
            ])
        );
        assert_eq!(parse(""), Ok(Vec::new()));
    }

    #[test]
    fn only_the_first_equals_sign_divides() {
        assert_eq!(parse("path=/a=b"), Ok(vec![item("path", "/a=b")]));
    }

    #[test]
    fn what_has_no_key_is_a_value() {
        for text in ["tty", "0000:01:00.0", "/sys/x=y"] {
            let bare = Item {
                key: None,
                value: Value::Text(text.to_owned()),
            };
            assert_eq!(parse(text), Ok(vec![bare]));
        }
    }

    #[test]
    fn quotes_and_brackets_hold_commas() {
        assert_eq!(
            parse(r#"path="/a,b ""c""",id=x"#),
            Ok(vec![item("path", r#"/a,b "c""#), item("id", "x")])
        );
        let list = vec![Value::Text("a".into()), Value::Text("b,c".into())];
        assert_eq!(
            parse(r#"to=[a,"b,c"],id=x"#).map(|items| items[0].value.clone()),
            Ok(Value::List(list))
        );
    }

    #[test]
    fn what_is_left_open_is_named() {
        assert_eq!(parse("path=\"a"), Err(SyntaxError::Quote));
        assert_eq!(parse("path=[a"), Err(SyntaxError::Bracket));
        assert_eq!(parse("path=a]"), Err(SyntaxError::Bracket));
        for text in [",", "a=1,", ",a=1", "a=1,,b=2"] {
            assert_eq!(parse(text), Err(SyntaxError::Comma), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_odd(text: String) {
            let _items = parse(&text);
        }

        #[test]
        fn no_row_of_marks_is_too_odd(text in r#"[\[\]",=a]{0,24}"#) {
            let _items = parse(&text);
        }

        #[test]
        fn what_is_written_is_read(
            pairs in prop::collection::vec(("[a-z_]{1,8}", any::<String>()), 0..6),
        ) {
            let items: Vec<_> = pairs.iter().map(|(key, value)| item(key, value)).collect();
            prop_assert_eq!(parse(&format(&items)), Ok(items));
        }

        #[test]
        fn a_list_that_is_written_is_read(
            values in prop::collection::vec(any::<String>().prop_map(Value::Text), 0..6),
        ) {
            let items = vec![Item { key: Some("to".into()), value: Value::List(values) }];
            prop_assert_eq!(parse(&format(&items)), Ok(items));
        }
    }
}
