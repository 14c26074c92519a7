//! A fleet CA: root, issuing CA, leaves.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fleet_kms_identity::KeyPair;
use fleet_kms_transport::{ClientTls, Clock, LiveIdentity, Roots, agent_client_tls};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyUsagePurpose, SanType, SerialNumber, SigningKey,
};
use rustls_pki_types::CertificateDer;

pub const CLUSTER: &str = "0f0e0d0c-0b0a-0908-0706-050403020100";

pub fn clock() -> Clock {
    Arc::new(SystemTime::now)
}

pub struct Ca {
    root: CertificateDer<'static>,
    issuing: CertificateDer<'static>,
    issuer: Issuer<'static, rcgen::KeyPair>,
    issuing_key: rcgen::KeyPair,
}

impl Ca {
    pub fn new() -> Self {
        let authority = |name: &str| {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            params.not_before = (SystemTime::now() - Duration::from_secs(3_600)).into();
            params.not_after = (SystemTime::now() + Duration::from_secs(86_400)).into();
            (params, rcgen::KeyPair::generate().unwrap())
        };
        let (root_params, root_key) = authority("root");
        let root = root_params.self_signed(&root_key).unwrap();
        let root_issuer = Issuer::from_params(&root_params, &root_key);
        let (params, key) = authority("issuing");
        let issuing = params.signed_by(&key, &root_issuer).unwrap();
        let issuing_key = rcgen::KeyPair::from_pem(&key.serialize_pem()).unwrap();
        Self {
            root: root.der().clone(),
            issuing: issuing.der().clone(),
            issuer: Issuer::new(params, key),
            issuing_key,
        }
    }

    pub fn roots(&self) -> Arc<Roots> {
        Arc::new(Roots::new(vec![self.root.clone()]).unwrap())
    }

    pub fn root_der(&self) -> Vec<u8> {
        self.root.to_vec()
    }

    pub fn issuing_der(&self) -> Vec<u8> {
        self.issuing.to_vec()
    }

    /// What the issuing CA signs.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.issuing_key.sign(message).unwrap()
    }

    /// A node's certificate for the key of a request, good for `life`.
    pub fn certify(&self, csr: &[u8], name: &str, life: Duration) -> Vec<Vec<u8>> {
        let mut request = CertificateSigningRequestParams::from_der(&csr.into()).unwrap();
        let uri = format!("spiffe://prod/cluster/{CLUSTER}/node/{name}");
        request.params = leaf_params(&uri, ExtendedKeyUsagePurpose::ClientAuth);
        request.params.not_after = (SystemTime::now() + life).into();
        let leaf = request.signed_by(&self.issuer).unwrap();
        vec![leaf.der().to_vec(), self.issuing_der()]
    }

    /// An agent's identity as its enrolment port shows it: with the root.
    pub fn enrolment_agent(&self, name: &str) -> Arc<LiveIdentity> {
        let (chain, key) = self.enrolment_chain(name);
        Arc::new(LiveIdentity::new(chain, &key).unwrap())
    }

    /// Gives that identity its next certificate, with another key.
    pub fn renew_enrolment_agent(&self, live: &LiveIdentity, name: &str) {
        let (chain, key) = self.enrolment_chain(name);
        live.replace(chain, &key).unwrap();
    }

    fn enrolment_chain(&self, name: &str) -> (Vec<CertificateDer<'static>>, KeyPair) {
        let issuers = vec![self.issuing.clone(), self.root.clone()];
        self.chain(&format!("spiffe://prod/agent/{name}"), ExtendedKeyUsagePurpose::ServerAuth, issuers)
    }

    pub fn agent(&self, name: &str) -> Arc<LiveIdentity> {
        self.leaf(&format!("spiffe://prod/agent/{name}"), ExtendedKeyUsagePurpose::ServerAuth)
    }

    pub fn node(&self, name: &str) -> Arc<LiveIdentity> {
        self.leaf(
            &format!("spiffe://prod/cluster/{CLUSTER}/node/{name}"),
            ExtendedKeyUsagePurpose::ClientAuth,
        )
    }

    pub fn leaf(&self, uri: &str, usage: ExtendedKeyUsagePurpose) -> Arc<LiveIdentity> {
        let (chain, key) = self.chain(uri, usage, vec![self.issuing.clone()]);
        Arc::new(LiveIdentity::new(chain, &key).unwrap())
    }

    fn chain(
        &self,
        uri: &str,
        usage: ExtendedKeyUsagePurpose,
        mut issuers: Vec<CertificateDer<'static>>,
    ) -> (Vec<CertificateDer<'static>>, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let rcgen_key = rcgen::KeyPair::from_pem(&key.to_pem()).unwrap();
        let leaf = leaf_params(uri, usage).signed_by(&rcgen_key, &self.issuer).unwrap();
        issuers.insert(0, leaf.der().clone());
        (issuers, key)
    }

    pub fn client_tls(&self, identity: Arc<LiveIdentity>) -> ClientTls {
        agent_client_tls(Some(identity), self.roots(), clock(), "prod".parse().unwrap())
    }
}

fn leaf_params(uri: &str, usage: ExtendedKeyUsagePurpose) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    params.extended_key_usages = vec![usage];
    params.serial_number = Some(SerialNumber::from_slice(&[7; 16]));
    params.not_before = (SystemTime::now() - Duration::from_secs(60)).into();
    params.not_after = (SystemTime::now() + Duration::from_secs(3_600)).into();
    params
}
