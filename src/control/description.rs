//! `docs/api.yaml`, the description of what is served, for the tests that hold the server and its clients to it.

use saphyr::{LoadableYamlNode as _, Yaml};
use serde_json::{Map, Value};

/// The description, as JSON.
pub(crate) fn description() -> Value {
    let documents = Yaml::load_from_str(include_str!("../../docs/api.yaml")).unwrap();
    let [document] = &documents[..] else {
        panic!("one description, and not {}", documents.len());
    };
    json(document)
}

fn json(yaml: &Yaml<'_>) -> Value {
    if let Some(mapping) = yaml.as_mapping() {
        let entries = mapping
            .iter()
            .map(|(key, value)| (key.as_str().unwrap().to_owned(), json(value)));
        return entries.collect::<Map<_, _>>().into();
    }
    if let Some(sequence) = yaml.as_sequence() {
        return sequence.iter().map(json).collect();
    }
    let scalar = [
        yaml.as_bool().map(Value::from),
        yaml.as_integer().map(Value::from),
        yaml.as_str().map(Value::from),
    ];
    let scalar = scalar.into_iter().flatten().next();
    scalar.unwrap_or_else(|| panic!("{yaml:?} is nothing that the description has"))
}
