//! The text is OpenMetrics, and whoever draws it finds what is drawn.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::control::tests::observed;

/// A metric as it is read: its type, and its values by name and labels.
#[derive(Debug, Default)]
struct Read {
    kind: String,
    values: BTreeMap<String, f64>,
}

/// Reads the text as strictly as OpenMetrics 1.0 §5 says what is used of it.
fn read(text: &str) -> BTreeMap<String, Read> {
    let mut all = BTreeMap::<String, Read>::new();
    let (mut family, mut ended) = (String::new(), false);
    for line in text.lines() {
        assert!(!ended, "something after the end: {line}");
        if line == "# EOF" {
            ended = true;
        } else if let Some(rest) = line.strip_prefix("# ") {
            let mut words = rest.splitn(3, ' ');
            let (what, name) = (words.next().unwrap(), words.next().unwrap());
            let said = words.next().unwrap();
            match what {
                "HELP" => {
                    assert!(!all.contains_key(name), "{name} is there twice");
                    assert!(!said.is_empty(), "{line}");
                    family = name.to_owned();
                }
                "TYPE" => {
                    assert!(["counter", "gauge"].contains(&said), "{line}");
                    all.entry(name.to_owned()).or_default().kind = said.to_owned();
                    family = name.to_owned();
                }
                "UNIT" => {
                    assert!(["bytes", "seconds"].contains(&said), "{line}");
                    assert!(name.ends_with(&format!("_{said}")), "{line}");
                }
                _ => panic!("{line}"),
            }
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            let read = all.get_mut(&family).unwrap();
            let expected = match read.kind.as_str() {
                "counter" => format!("{family}_total"),
                _ => family.clone(),
            };
            assert_eq!(name, expected, "{line}");
            labels(series);
            let value = value.parse().unwrap();
            assert_eq!(read.values.insert(series.to_owned(), value), None, "{line}");
        }
    }
    assert!(ended, "no end");
    all
}

/// The labels of a series, read as a parser does.
fn labels(series: &str) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let Some((_, rest)) = series.split_once('{') else {
        return all;
    };
    let mut rest = rest.strip_suffix('}').unwrap();
    while !rest.is_empty() {
        let (name, after) = rest.split_once("=\"").unwrap();
        assert!(
            name.bytes()
                .all(|byte| byte == b'_' || byte.is_ascii_lowercase())
        );
        let (mut value, mut characters) = (String::new(), after.char_indices());
        let end = loop {
            match characters.next().unwrap() {
                (at, '"') => break at,
                (_, '\\') => value.push(match characters.next().unwrap().1 {
                    'n' => '\n',
                    other => other,
                }),
                (_, other) => value.push(other),
            }
        };
        assert_eq!(all.insert(name.to_owned(), value), None, "{series}");
        rest = &after[end + 1..];
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
    all
}

fn whole() -> BTreeMap<String, Read> {
    read(&text(Some(&observed(State::Running))).unwrap())
}

#[test]
fn the_text_is_openmetrics_and_names_are_after_the_conventions() {
    let all = whole();
    for (name, read) in &all {
        assert!(
            name.starts_with("busway_") || name.starts_with("process_"),
            "{name}"
        );
        assert!(
            name.bytes()
                .all(|byte| byte == b'_' || byte.is_ascii_lowercase())
        );
        for unit in ["_milliseconds", "_microseconds", "_kilobytes", "_us", "_ms"] {
            assert!(!name.ends_with(unit), "{name}");
        }
        assert!(!name.ends_with("_total"), "{name} {read:?}");
    }
    let value = |family: &str, series: &str| all[family].values[series];
    assert_eq!(
        value(
            "busway_disk_read_bytes",
            "busway_disk_read_bytes_total{device=\"disk0\"}"
        ),
        8192.0
    );
    assert_eq!(
        value(
            "busway_disk_read_time_seconds",
            "busway_disk_read_time_seconds_total{device=\"disk0\"}"
        ),
        0.0003
    );
    assert_eq!(
        value("busway_guest_uptime_seconds", "busway_guest_uptime_seconds"),
        1.5
    );
    assert_eq!(
        value(
            "busway_vcpu_exits",
            "busway_vcpu_exits_total{vcpu=\"1\",kind=\"mmio_read\"}"
        ),
        7.0
    );
    assert_eq!(value("busway_dma_mappings", "busway_dma_mappings"), 3.0);
}

#[test]
fn a_name_that_somebody_chose_breaks_no_line_and_is_read_back() {
    let mut seen = observed(State::Running);
    for (device, id) in seen
        .devices
        .iter_mut()
        .zip(["a\"b\\c\n# EOF", "disk0", "__rng"])
    {
        device.id = id.into();
    }
    // Two of one name are one.
    let all = read(&text(Some(&seen)).unwrap());
    let info = &all["busway_device_info"].values;
    let ids: Vec<_> = info
        .keys()
        .map(|series| labels(series)["device"].clone())
        .collect();
    assert!(ids.contains(&"a\"b\\c\n# EOF".to_owned()), "{ids:?}");
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len());
}

#[test]
fn labels_have_as_many_values_as_the_vm_has_parts() {
    let (all, seen) = (whole(), observed(State::Running));
    for (name, read) in &all {
        let most = match name.as_str() {
            name if name.starts_with("busway_thread") => continue,
            "busway_vm_state" => 5,
            "busway_vcpu_exits" | "busway_vcpu_kvm_events" => seen.vcpus.len() * 13,
            name if name.contains("device")
                || name.contains("disk")
                || name.contains("network") =>
            {
                seen.devices.len() * 5
            }
            _ => 2,
        };
        assert!(read.values.len() <= most, "{name}: {}", read.values.len());
    }
}

#[test]
fn without_a_vm_there_are_the_same_metrics_with_what_is_known() {
    let none = read(&text(None).unwrap());
    assert_eq!(
        none.keys().collect::<Vec<_>>(),
        whole().keys().collect::<Vec<_>>()
    );
    assert!(none["busway_vcpu_exits"].values.is_empty());
    assert!(none["process_cpu_seconds"].values["process_cpu_seconds_total"] > 0.0);
}

/// Every text called `expr` in the dashboard.
fn queries<'a>(value: &'a serde_json::Value, found: &mut Vec<&'a str>) {
    match value {
        serde_json::Value::Object(map) => {
            found.extend(map.get("expr").and_then(|expr| expr.as_str()));
            map.values().for_each(|value| queries(value, found));
        }
        serde_json::Value::Array(all) => all.iter().for_each(|value| queries(value, found)),
        _ => {}
    }
}

#[test]
fn every_query_of_the_dashboard_names_metrics_and_labels_that_there_are() {
    let dashboard = include_str!("../../../docs/grafana.json");
    let dashboard: serde_json::Value = serde_json::from_str(dashboard).unwrap();
    let all = whole();
    let names: BTreeMap<String, BTreeSet<String>> = all
        .iter()
        .map(|(family, read)| {
            let name = match read.kind.as_str() {
                "counter" => format!("{family}_total"),
                _ => family.clone(),
            };
            let labels = read
                .values
                .keys()
                .flat_map(|series| labels(series).into_keys());
            (name, labels.collect())
        })
        .collect();
    let mut found = Vec::new();
    queries(&dashboard, &mut found);
    assert!(found.len() > 10, "{found:?}");
    let (mut drawn, is_word) = (BTreeSet::new(), |c: char| {
        c == '_' || c.is_ascii_alphanumeric()
    });
    for query in found {
        let words = query.split(|c| !is_word(c));
        let metrics: Vec<_> = words
            .filter(|word| word.starts_with("busway_") || word.starts_with("process_"))
            .collect();
        assert!(!metrics.is_empty(), "{query}");
        for metric in &metrics {
            assert!(names.contains_key(*metric), "{metric} of {query}");
        }
        // What is summed by is a label of a metric of the query.
        for by in query.split("by (").skip(1) {
            let by = by.split(')').next().unwrap();
            for label in by.split(',').map(str::trim) {
                let has = |metric: &&str| names[*metric].contains(label);
                let of_scrape = ["instance", "job"].contains(&label);
                // Threads are those of this process, which has no VM.
                let thread = label == "thread";
                assert!(
                    of_scrape || thread || metrics.iter().any(has),
                    "{label} of {query}"
                );
            }
        }
        drawn.extend(metrics);
    }
    assert!(drawn.len() > 15, "{drawn:?}");
}
