//! kube-apiserver's EncryptionConfiguration: does it send Secrets to this
//! socket, and sensibly?
//!
//! It may hold keys of other providers. Nothing of it is printed but names of
//! providers, endpoints and numbers, not even in an error.

use std::io;
use std::path::Path;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::AS_ROOT;
use super::apiserver::{Apiserver, Place, read};
use super::endpoint::{Leads, leads};
use super::report::{Check, CheckId};
use crate::errors::chain;

/// DEKs that kube-apiserver keeps if nobody says otherwise, and what we ship.
const DEFAULT_CACHE: i64 = 1_000;
const WANTED_CACHE: i64 = 20_000;

const SHIPPED: &str = "compare with deploy/kubernetes/encryption-configuration.v1.yaml (or .v2.yaml)";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct EncryptionConfiguration {
    kind: String,
    resources: Vec<Entry>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    resources: Vec<String>,
    providers: Vec<Provider>,
}

/// One of these is set. Keys are skipped, not read.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Provider {
    kms: Option<Kms>,
    identity: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kms {
    api_version: Option<String>,
    #[serde(default)]
    name: String,
    #[serde(default)]
    endpoint: String,
    cachesize: Option<i64>,
}

impl Kms {
    fn is_v1(&self) -> bool {
        self.api_version.as_deref().unwrap_or("v1") == "v1"
    }
}

/// Looks at the flags of one kube-apiserver, and at the file that they name.
pub(super) fn examine(apiserver: &Apiserver, socket: &Path) -> Vec<Check> {
    let mut checks = vec![Check::ok(CheckId::Apiserver, &apiserver.name, "its flags are read")];
    let Some(file) = apiserver.flag("encryption-provider-config").filter(|file| !file.is_empty()) else {
        let message = "kube-apiserver has no --encryption-provider-config: it stores Secrets in clear";
        checks.push(Check::fail(
            CheckId::ApiserverFlag,
            &apiserver.name,
            message,
            "set it, on every server of the cluster; deploy/README.md says how",
        ));
        return checks;
    };
    checks.push(Check::ok(CheckId::ApiserverFlag, &apiserver.name, format!("reads {file}")));
    checks.push(apiserver.unsafe_delete());
    match load(apiserver, file) {
        Ok(config) => {
            checks.push(Check::ok(CheckId::EncryptionConfig, file, "is an EncryptionConfiguration"));
            let v1 = config.resources.iter().flat_map(|entry| &entry.providers);
            if v1.filter_map(|provider| provider.kms.as_ref()).any(Kms::is_v1) {
                checks.push(apiserver.kms_v1());
            }
            checks.extend(judge(&config, file, |endpoint| leads(apiserver, endpoint, socket)));
        }
        Err(check) => checks.push(check),
    }
    checks
}

fn load(apiserver: &Apiserver, file: &str) -> Result<EncryptionConfiguration, Check> {
    let id = CheckId::EncryptionConfig;
    let path = match apiserver.locate(Path::new(file)) {
        Place::Here(path) | Place::InRoot(path) => path,
        Place::PodOnly => {
            let message = "is in a volume of the pod alone, and is not checked";
            return Err(Check::warn(id, file, message, SHIPPED));
        }
        Place::Image => {
            let message = "is not mounted into kube-apiserver's pod, which cannot start without it";
            return Err(Check::fail(id, file, message, "mount its directory by a hostPath volume"));
        }
    };
    let text = read(&path).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => Check::warn(id, path.display(), chain(&error), AS_ROOT),
        _ => Check::fail(id, path.display(), chain(&error), "put it there, or correct the flag"),
    })?;
    let config: EncryptionConfiguration = serde_saphyr::from_str(&text).map_err(|error| {
        let line = error.location().map(|location| location.line()).unwrap_or_default();
        // Neither the line nor the parser's words: they may hold a key.
        let message = format!("line {line} cannot be parsed (it is not shown: it may hold a key)");
        Check::fail(id, path.display(), message, SHIPPED)
    })?;
    match config.kind.as_str() {
        "EncryptionConfiguration" => Ok(config),
        _ => Err(Check::fail(id, path.display(), "is no EncryptionConfiguration", SHIPPED)),
    }
}

/// Judges the first entry that is about Secrets: no other counts for them.
fn judge(config: &EncryptionConfiguration, file: &str, leads: impl Fn(&str) -> Leads) -> Vec<Check> {
    let Some(entry) =
        config.resources.iter().find(|entry| entry.resources.iter().any(|name| is_secrets(name)))
    else {
        let message = "no entry is about Secrets: they are stored in clear";
        return vec![Check::fail(CheckId::EncryptionResources, file, message, SHIPPED)];
    };
    let mut checks = vec![Check::ok(CheckId::EncryptionResources, file, "an entry is about Secrets")];
    let stanzas: Vec<&Kms> = entry.providers.iter().filter_map(|provider| provider.kms.as_ref()).collect();
    let Some(ours) = stanzas.iter().find(|kms| leads(&kms.endpoint) == Leads::Here) else {
        checks.push(no_endpoint(&stanzas, file, leads));
        return checks;
    };
    let version = if ours.is_v1() { "v1" } else { "v2" };
    let message = format!("the provider {} ({version}) has this socket as its endpoint", ours.name);
    checks.push(Check::ok(CheckId::EncryptionEndpoint, file, message));
    checks.push(order(&entry.providers, file, |kms| leads(&kms.endpoint) == Leads::Here));
    checks.push(cache(ours, file));
    checks
}

/// `*.` is all of the core group, `*.*` all there is.
fn is_secrets(resource: &str) -> bool {
    matches!(resource, "secrets" | "secrets." | "*." | "*.*")
}

fn no_endpoint(stanzas: &[&Kms], file: &str, leads: impl Fn(&str) -> Leads) -> Check {
    let id = CheckId::EncryptionEndpoint;
    if stanzas.is_empty() {
        return Check::fail(id, file, "no provider for Secrets is a KMS", SHIPPED);
    }
    let found: Vec<String> = stanzas
        .iter()
        .map(|kms| {
            let why = match leads(&kms.endpoint) {
                Leads::Here | Leads::Elsewhere => "another path",
                Leads::Nowhere => "not mounted into kube-apiserver's pod",
                Leads::NoPath => "no unix:///path",
            };
            format!("{} ({why})", kms.endpoint)
        })
        .collect();
    let message =
        format!("no provider for Secrets has this socket as its endpoint, but {}", found.join(", "));
    let remedy =
        "make endpoint unix:// followed by socket.path, and mount that directory into kube-apiserver's pod";
    Check::fail(id, file, message, remedy)
}

/// The first provider writes; all of them read.
fn order(providers: &[Provider], file: &str, is_ours: impl Fn(&Kms) -> bool) -> Check {
    let id = CheckId::EncryptionOrder;
    let identity = providers.iter().any(|provider| provider.identity.is_some());
    match providers.first() {
        Some(Provider { kms: Some(kms), .. }) if is_ours(kms) && identity => {
            let message = "Secrets are encrypted here; identity still reads what is in clear, and can go once all is rewritten";
            Check::ok(id, file, message)
        }
        Some(Provider { kms: Some(kms), .. }) if is_ours(kms) => {
            Check::ok(id, file, "Secrets are encrypted here")
        }
        Some(Provider { identity: Some(_), .. }) => {
            let message = "identity comes first: Secrets are written in clear";
            Check::fail(
                id,
                file,
                message,
                "put the kms provider first and identity last, then rewrite all Secrets",
            )
        }
        _ => {
            let message = "another provider comes first: it encrypts what is written, this one only reads";
            Check::warn(
                id,
                file,
                message,
                "fine in the middle of a migration; at its end put this provider first",
            )
        }
    }
}

fn cache(kms: &Kms, file: &str) -> Check {
    let id = CheckId::EncryptionCache;
    let remedy = format!("set cachesize: {WANTED_CACHE}, at least 1.2 times the encrypted objects");
    match (kms.is_v1(), kms.cachesize) {
        (false, None) => Check::ok(id, file, "KMS v2 needs no cachesize"),
        (false, Some(_)) => {
            let message = "KMS v2 refuses cachesize: kube-apiserver does not start";
            Check::fail(id, file, message, "remove cachesize")
        }
        (true, Some(0)) => Check::fail(id, file, "kube-apiserver refuses cachesize 0", remedy),
        (true, Some(size)) if size < 0 => {
            Check::warn(id, file, "without a cache every read of every Secret asks an agent", remedy)
        }
        (true, size) => {
            let kept = size.unwrap_or(DEFAULT_CACHE);
            if kept >= WANTED_CACHE {
                return Check::ok(id, file, format!("cachesize {kept}"));
            }
            let default = if size.is_none() { " by default" } else { "" };
            let message = format!(
                "cachesize is {kept}{default}: with more encrypted objects than that, every LIST decrypts them all again"
            );
            Check::warn(id, file, message, remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::endpoint::endpoint_path;
    use super::super::report::Status;
    use super::*;

    const GOOD: &str = "
apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - kms: {apiVersion: v1, name: kms-plugin, endpoint: 'unix:///run/x/kms.sock', cachesize: 20000, timeout: 3s}
  - identity: {}
";

    fn judged(text: &str) -> Vec<(&'static str, Status)> {
        let config: EncryptionConfiguration = serde_saphyr::from_str(text).unwrap();
        let leads = |endpoint: &str| match endpoint_path(endpoint) {
            None => Leads::NoPath,
            Some(path) if path == Path::new("/run/x/kms.sock") => Leads::Here,
            Some(_) => Leads::Elsewhere,
        };
        judge(&config, "file", leads).iter().map(|check| (check.id.as_str(), check.status)).collect()
    }

    fn only_problem(text: &str) -> (&'static str, Status) {
        let problems: Vec<_> = judged(text).into_iter().filter(|(_, status)| *status != Status::Ok).collect();
        assert_eq!(problems.len(), 1, "{problems:?}");
        problems[0]
    }

    #[test]
    fn what_we_ship_is_ok() {
        for shipped in [
            include_str!("../../../../deploy/kubernetes/encryption-configuration.v1.yaml"),
            include_str!("../../../../deploy/kubernetes/encryption-configuration.v2.yaml"),
            GOOD,
        ] {
            let text = shipped.replace("/run/fleet-kms/", "/run/x/");
            assert!(judged(&text).iter().all(|(_, status)| *status == Status::Ok), "{:?}", judged(&text));
        }
    }

    #[test]
    fn each_mistake_is_found_for_itself() {
        for (from, to, problem) in [
            ("secrets", "configmaps", ("encryption_resources", Status::Fail)),
            ("/run/x/", "/run/y/", ("encryption_endpoint", Status::Fail)),
            ("unix:///run", "unix://run", ("encryption_endpoint", Status::Fail)),
            ("unix:///run/x", "tcp://run/x", ("encryption_endpoint", Status::Fail)),
            ("20000", "19999", ("encryption_cache", Status::Warn)),
            (", cachesize: 20000", "", ("encryption_cache", Status::Warn)),
            ("20000", "-1", ("encryption_cache", Status::Warn)),
            ("20000", "0", ("encryption_cache", Status::Fail)),
            ("apiVersion: v1,", "apiVersion: v2,", ("encryption_cache", Status::Fail)),
            ("providers:", "providers:\n  - identity: {}", ("encryption_order", Status::Fail)),
            ("providers:", "providers:\n  - aescbc: {keys: []}", ("encryption_order", Status::Warn)),
        ] {
            assert_eq!(only_problem(&GOOD.replacen(from, to, 1)), problem, "{from} -> {to}");
        }
    }

    #[test]
    fn the_first_entry_about_secrets_counts() {
        let twice = GOOD
            .replace("resources:\n-", "resources:\n- {resources: ['*.*'], providers: [{identity: {}}]}\n-");
        assert_eq!(only_problem(&twice), ("encryption_endpoint", Status::Fail));
    }
}
