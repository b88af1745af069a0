//! Artifacts in a bucket of any S3-compatible server.
//!
//! Only what all of them do alike is used: no conditional writes, tags or versions. Objects travel whole from memory,
//! since some servers refuse a streamed signature over plain HTTP. Keys come from the configuration or the
//! environment; there are no instance roles.

mod error;
mod settings;

use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::presigning::PresigningConfig;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{BucketLocationConstraint, CreateBucketConfiguration};
use bytes::Bytes;
use tokio::time::timeout;

use super::path::{check, check_prefix};
use super::{ArtifactError, ArtifactKey, ArtifactStore, Result};
use crate::config::ArtifactsConfig;
use error::{Subject, failed};
use settings::{CALL_TIMEOUT, Location, client};

/// A ping answers within this time.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest that a signature can be valid for.
const PRESIGN_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// AWS takes no region's name for this one when a bucket is made.
const DEFAULT_REGION: &str = "us-east-1";

/// See the module.
pub struct S3Artifacts {
    client: Client,
    /// Signs URLs for the address that clients of the API know the server by.
    public: Client,
    location: Location,
    region: String,
}

impl S3Artifacts {
    /// A store in the bucket that the configuration's `s3://BUCKET[/PREFIX]` names. Connects when it is first used.
    pub fn open(config: &ArtifactsConfig) -> Result<Self> {
        let endpoint = config.endpoint.as_deref();
        Ok(Self {
            client: client(config, endpoint)?,
            public: client(config, config.public_endpoint.as_deref().or(endpoint))?,
            location: Location::parse(&config.url)?,
            region: config.region.clone(),
        })
    }

    /// Makes the bucket if there is none.
    pub async fn ensure_bucket(&self) -> Result<()> {
        let bucket = &self.location.bucket;
        let found = self.client.head_bucket().bucket(bucket).send().await;
        match found {
            Err(error) if error.raw_response().is_some_and(|response| response.status().as_u16() == 404) => {}
            found => return found.map(drop).map_err(|error| failed(error, Subject::Bucket, bucket)),
        }
        let place = CreateBucketConfiguration::builder()
            .location_constraint(BucketLocationConstraint::from(self.region.as_str()))
            .build();
        let place = (self.region != DEFAULT_REGION).then_some(place);
        match self.client.create_bucket().bucket(bucket).set_create_bucket_configuration(place).send().await {
            // Another process was quicker.
            Err(error) if error.as_service_error().is_some_and(|error| error.is_bucket_already_owned_by_you()) => {
                Ok(())
            }
            made => made.map(drop).map_err(|error| failed(error, Subject::Bucket, bucket)),
        }
    }

    /// An object's key in the bucket.
    fn key(&self, path: &str) -> Result<String> {
        Ok(format!("{}{}", self.location.prefix, check(path)?))
    }
}

#[async_trait]
impl ArtifactStore for S3Artifacts {
    async fn ping(&self) -> Result<()> {
        let bucket = &self.location.bucket;
        match timeout(PING_TIMEOUT, self.client.head_bucket().bucket(bucket).send()).await {
            Ok(answer) => answer.map(drop).map_err(|error| failed(error, Subject::Bucket, bucket)),
            Err(_) => Err(no_answer(PING_TIMEOUT)),
        }
    }

    async fn put(&self, key: &ArtifactKey, bytes: Bytes) -> Result<()> {
        let (path, bucket) = (key.path(), &self.location.bucket);
        let request = self
            .client
            .put_object()
            .bucket(bucket)
            .key(self.key(&path)?)
            .content_type(key.content_type())
            .body(ByteStream::from(bytes));
        request.send().await.map(drop).map_err(|error| failed(error, Subject::Object(&path), bucket))
    }

    async fn get(&self, path: &str) -> Result<Bytes> {
        let bucket = &self.location.bucket;
        let request = self.client.get_object().bucket(bucket).key(self.key(path)?);
        let whole = async {
            let object = request.send().await.map_err(|error| failed(error, Subject::Object(path), bucket))?;
            // The client's own time limits end with the headers, and a body that breaks off is not asked for again.
            let body = object.body.collect().await.map_err(|error| ArtifactError::Unavailable(error.into()))?;
            Ok(body.into_bytes())
        };
        timeout(CALL_TIMEOUT, whole).await.unwrap_or_else(|_| Err(no_answer(CALL_TIMEOUT)))
    }

    async fn delete(&self, path: &str) -> Result<()> {
        let bucket = &self.location.bucket;
        let request = self.client.delete_object().bucket(bucket).key(self.key(path)?);
        match request.send().await.map_err(|error| failed(error, Subject::Object(path), bucket)) {
            Ok(_) | Err(ArtifactError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>> {
        let bucket = &self.location.bucket;
        let wanted = format!("{}{}", self.location.prefix, check_prefix(prefix)?);
        let request = self.client.list_objects_v2().bucket(bucket).prefix(&wanted);
        let mut pages = request.into_paginator().send();
        let mut paths = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| failed(error, Subject::Bucket, bucket))?;
            let keys = page.contents().iter().filter_map(|object| object.key());
            paths.extend(keys.filter_map(|key| key.strip_prefix(&self.location.prefix)).map(str::to_owned));
        }
        paths.sort_unstable();
        Ok(paths)
    }

    fn path_of(&self, address: &str) -> Option<String> {
        self.location.path_of(address)
    }

    async fn presign(&self, path: &str, valid_for: Duration) -> Result<Option<String>> {
        let bucket = &self.location.bucket;
        let validity = PresigningConfig::expires_in(valid_for.clamp(Duration::from_secs(1), PRESIGN_MAX))
            .map_err(|error| ArtifactError::Internal(error.into()))?;
        let request = self.public.get_object().bucket(bucket).key(self.key(path)?);
        let signed = request.presigned(validity).await.map_err(|error| failed(error, Subject::Object(path), bucket))?;
        Ok(Some(signed.uri().to_owned()))
    }
}

fn no_answer(limit: Duration) -> ArtifactError {
    ArtifactError::Unavailable(format!("the S3 server did not answer within {} s", limit.as_secs()).into())
}
