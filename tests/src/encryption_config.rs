//! The EncryptionConfiguration of kube-apiserver, as far as tests need it.

use std::fs;
use std::path::Path;

/// How Secrets are stored.
#[derive(Clone, Debug)]
pub struct EncryptionConfig {
    providers: Vec<String>,
    /// The text of a shipped file, which then is all there is.
    shipped: Option<String>,
}

impl EncryptionConfig {
    /// By a plugin of KMS v1 on `socket`, with the provider name of the documentation.
    pub fn v1(socket: &Path) -> Self {
        Self::kms("v1", "kms-plugin", socket)
    }

    /// By a plugin of KMS v2 on `socket`.
    pub fn v2(socket: &Path) -> Self {
        Self::kms("v2", "kms-plugin", socket)
    }

    /// As [`EncryptionConfig::v1`], but the API server keeps no DEK, so that each read asks the plugin.
    pub fn v1_without_cache(socket: &Path) -> Self {
        let mut config = Self::v1(socket);
        for provider in &mut config.providers {
            *provider = provider.replace("cachesize: 20000", "cachesize: -1");
        }
        config
    }

    /// In clear.
    pub fn identity() -> Self {
        Self { providers: vec!["- identity: {}".to_owned()], shipped: None }
    }

    /// The file that `deploy/` ships for `api` (`v1` or `v2`), with nothing but the socket's path replaced.
    ///
    /// # Errors
    /// When there is none, or it names another path.
    pub fn shipped(api: &str, socket: &Path) -> anyhow::Result<Self> {
        const SHIPPED_SOCKET: &str = "unix:///run/fleet-kms/kms.sock";
        let file = format!(
            "{}/../deploy/kubernetes/encryption-configuration.{api}.yaml",
            env!("CARGO_MANIFEST_DIR")
        );
        let text = fs::read_to_string(&file)?;
        anyhow::ensure!(text.contains(SHIPPED_SOCKET), "{file} does not name {SHIPPED_SOCKET}");
        let text = text.replace(SHIPPED_SOCKET, &format!("unix://{}", socket.display()));
        Ok(Self { providers: Vec::new(), shipped: Some(text) })
    }

    /// Reads with `other` what was stored before; what is stored from now on is stored as `self` says.
    #[must_use]
    pub fn also_reading(mut self, other: Self) -> Self {
        self.providers.extend(other.providers);
        self
    }

    /// Gives the first provider another name: the API server then takes it for another provider.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        if let Some(provider) = self.providers.first_mut() {
            *provider = provider.replace("name: kms-plugin", &format!("name: {name}"));
        }
        self
    }

    fn kms(api: &str, name: &str, socket: &Path) -> Self {
        // Enough for every object of a test. v2 refuses the key.
        let cache = if api == "v1" { ", cachesize: 20000" } else { "" };
        let endpoint = socket.display();
        Self {
            providers: vec![format!(
                "- kms: {{apiVersion: {api}, name: {name}, endpoint: \"unix://{endpoint}\", timeout: 3s{cache}}}"
            )],
            shipped: None,
        }
    }

    /// The file for `--encryption-provider-config`.
    pub fn to_yaml(&self) -> String {
        if let Some(text) = &self.shipped {
            return text.clone();
        }
        format!(
            "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n\
             \x20 - resources: [secrets]\n    providers:\n      {}\n",
            self.providers.join("\n      ")
        )
    }
}
