//! `docs/kubernetes.md`: its files are what they say that they are and go together, and Busway takes its commands.

use std::collections::BTreeSet;

use busway::cli::device::DeviceArgs;
use clap::{Args as _, FromArgMatches as _};
use saphyr::{LoadableYamlNode as _, Yaml};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::busway;

#[allow(unreachable_pub)]
#[path = "../lab/src/page.rs"]
mod page;

const PAGE: &str = include_str!("../../docs/kubernetes.md");

/// The page's tables: Kata's, and containerd's.
fn tables() -> [Spanned<DeTable<'static>>; 2] {
    let tables = page::blocks(PAGE, "toml").into_iter();
    let tables: Vec<_> = tables.map(|text| DeTable::parse(text).unwrap()).collect();
    tables.try_into().unwrap()
}

fn value<'a>(table: &'a Spanned<DeTable<'_>>, path: &[&str]) -> &'a DeValue<'a> {
    let (first, rest) = path.split_first().unwrap();
    let first = table.get_ref().get(*first).unwrap().get_ref();
    rest.iter()
        .fold(first, |value, key| value.get(*key).unwrap().get_ref())
}

/// The page's objects: runtime class, map and pod.
fn objects() -> [Yaml<'static>; 3] {
    let mut objects = Vec::new();
    for text in page::blocks(PAGE, "yaml") {
        objects.extend(Yaml::load_from_str(text).unwrap());
    }
    objects.try_into().unwrap()
}

fn text<'a>(yaml: &'a Yaml<'_>, path: &[&str]) -> &'a str {
    let found = path.iter().fold(yaml, |yaml, key| &yaml[*key]);
    found.as_str().unwrap_or_else(|| panic!("{path:?}"))
}

fn keys<'a>(yaml: &'a Yaml<'_>) -> BTreeSet<&'a str> {
    let all = yaml.as_mapping().unwrap();
    all.keys().map(|key| key.as_str().unwrap()).collect()
}

#[test]
fn katas_configuration_starts_busway_and_plugs_devices_before_the_boot() {
    let [kata, containerd] = tables();
    let clh = |key| value(&kata, &["hypervisor", "clh", key]);
    let path = clh("path").as_str().unwrap();
    let valid = clh("valid_hypervisor_paths").as_array().unwrap();
    assert!(valid.iter().any(|one| one.get_ref().as_str() == Some(path)));
    assert!(PAGE.contains(&format!("install -m 755 busway {path}\n")));
    assert_eq!(clh("cold_plug_vfio").as_str(), Some("root-port"));
    let hot = value(&kata, &["hypervisor", "clh"]).get("hot_plug_vfio");
    assert!(hot.is_none(), "Kata wants what comes later on bus 0");
    let mode = value(&kata, &["runtime", "vfio_mode"]);
    assert_eq!(mode.as_str(), Some("guest-kernel"));
    let sized = value(&kata, &["runtime", "static_sandbox_resource_mgmt"]);
    assert_eq!(sized.as_bool(), Some(true));
    let [class, ..] = objects();
    let handler = text(&class, &["handler"]);
    let runtimes = [
        "plugins",
        "io.containerd.grpc.v1.cri",
        "containerd",
        "runtimes",
    ];
    let path = [&runtimes[..], &[handler, "options", "ConfigPath"]].concat();
    let path = value(&containerd, &path).as_str().unwrap();
    assert!(PAGE.contains(&format!("`{path}`")), "{path}");
}

#[test]
fn the_pod_asks_for_what_the_plugin_offers_by_the_class_that_there_is() {
    let [class, map, pod] = objects();
    for (object, kind) in [(&class, "RuntimeClass"), (&map, "ConfigMap"), (&pod, "Pod")] {
        assert_eq!(text(object, &["kind"]), kind);
    }
    assert_eq!(
        text(&pod, &["spec", "runtimeClassName"]),
        text(&class, &["metadata", "name"])
    );
    let list: serde_json::Value =
        serde_json::from_str(text(&map, &["data", "config.json"])).unwrap();
    let resource = &list["resourceList"][0];
    assert_eq!(resource["selectors"]["drivers"][0], "vfio-pci");
    let part = |key: &str| resource[key].as_str().unwrap().to_owned();
    let offered = format!("{}/{}", part("resourcePrefix"), part("resourceName"));
    let resources = &pod["spec"]["containers"][0]["resources"];
    let name = text(&pod, &["metadata", "name"]);
    assert!(
        page::block(PAGE, "console")
            .unwrap()
            .contains(&format!("kubectl exec {name} "))
    );
    // Kubernetes lends devices only where both are the same.
    assert_eq!(resources["limits"], resources["requests"]);
    assert_eq!(
        keys(&resources["limits"]),
        BTreeSet::from(["busway.example/nvme", &offered, "cpu", "memory"])
    );
    assert!(PAGE.contains("the resource is called `busway.example/nvme` here"));
}

#[test]
fn the_pages_commands_are_ones_that_busway_takes() {
    let commands = page::blocks(PAGE, "sh").into_iter().flat_map(str::lines);
    let commands: Vec<_> = commands
        .filter_map(|line| line.strip_prefix("busway "))
        .collect();
    assert!(commands.len() >= 4, "{commands:?}");
    for command in commands {
        let Some(words) = command.strip_prefix("device ") else {
            busway()
                .args(command.split(' '))
                .arg("--help")
                .assert()
                .success();
            continue;
        };
        let parser = DeviceArgs::augment_args(clap::Command::new("busway device"));
        let matches =
            parser.try_get_matches_from(std::iter::once("busway device").chain(words.split(' ')));
        let taken = matches.and_then(|matches| DeviceArgs::from_arg_matches(&matches));
        assert!(taken.is_ok(), "busway {command}: {}", taken.unwrap_err());
    }
}
